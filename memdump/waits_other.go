//go:build !amd64

package memdump

var idleCallsOfArch []int

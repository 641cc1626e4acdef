//go:build !man

package main

import (
	"context"
	"fmt"
	"os"
)

func main() {
	var code int
	root := command(&code)
	if err := root.ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "vmsnapd:", err)
		os.Exit(1)
	}
	os.Exit(code)
}

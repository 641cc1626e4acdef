//go:build man

package main

import (
	"log"
	"os"

	"github.com/spf13/cobra/doc"
)

// With the tag "man" this program writes its manual pages, to the directory
// that is its argument.
func main() {
	root := command(new(int))
	root.DisableAutoGenTag = true
	header := &doc.GenManHeader{Section: "8", Source: "vmsnap", Manual: "vmsnap"}
	if err := doc.GenManTree(root, header, os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

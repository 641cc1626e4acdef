// Package plot draws line charts as SVG: small multiples of one figure each, for
// documents. It depends on nothing, so that a benchmark's result needs no other
// program to be looked at.
//
// The background is left transparent, and every colour is one that can be read on
// white as well as on black, since a document is shown on either.
//
// A figure that is given the same data is the same text, byte for byte. Nothing
// here is shared, so all of it may be used from any goroutine.
package plot

package discover

import "strings"

// blockGraph is the set of named nodes of the command line.
type blockGraph struct {
	nodes  map[string]settings
	inner  map[string]bool  // nodes that another node stands on
	images map[string]image // what was found of nodes
}

func newBlockGraph(blockdevs []settings) blockGraph {
	g := blockGraph{nodes: map[string]settings{}, inner: map[string]bool{}, images: map[string]image{}}
	for _, s := range blockdevs {
		if name := s.value("node-name"); name != "" {
			g.nodes[name] = s
		}
	}
	for _, s := range blockdevs {
		for _, kv := range s {
			if _, node := g.nodes[kv.value]; node && isChildKey(kv.key) {
				g.inner[kv.value] = true
			}
		}
	}
	return g
}

// isChildKey reports whether the value of a key can be the name of a node that
// the node stands on. The last part of a dotted key decides.
func isChildKey(key string) bool {
	parts := strings.Split(key, ".")
	switch last := parts[len(parts)-1]; last {
	case "file", "backing", "data-file", "image", "test", "raw", "log", "target", "bottom":
		return true
	default:
		return len(parts) > 1 && parts[len(parts)-2] == "children" // of quorum
	}
}

// filters are the drivers that change how a node is accessed, not what format
// it has.
var filters = map[string]bool{
	"throttle": true, "copy-on-read": true, "copy-before-write": true,
	"compress": true, "preallocate": true, "blkdebug": true,
	"blklogwrites": true, "blkreplay": true, "blkverify": true,
	"snapshot-access": true,
}

// formats are the drivers of image formats.
var formats = map[string]bool{
	"raw": true, "qcow2": true, "qcow": true, "qed": true, "vmdk": true,
	"vdi": true, "vhdx": true, "vpc": true, "luks": true, "parallels": true,
	"bochs": true, "cloop": true, "dmg": true,
}

// image is what a node opens in the end, and how.
type image struct {
	format, protocol, file string
	aio, discard           string
	explicitBacking        bool
}

// note takes over what one node on the way says. The format node is nearer to
// the guest than its file and decides about discards.
func (im *image) note(s settings) {
	if v := s.value("aio"); v != "" {
		im.aio = v
	}
	if im.discard == "" {
		im.discard = discardMode(s)
	}
	im.explicitBacking = im.explicitBacking || s.has("backing") || s.child("backing") != nil
}

// discardMode spells a node's discard= as QMP does.
func discardMode(s settings) string {
	switch v := s.value("discard"); v {
	case "on":
		return "unmap"
	case "off":
		return "ignore"
	default:
		return v
	}
}

// maxGraphDepth bounds the walk down a graph in nodes; a few are usual.
const maxGraphDepth = 32

// image follows a node through filters and its format to its protocol.
func (g blockGraph) image(s settings) image { return g.imageAt(s, 0) }

func (g blockGraph) imageAt(s settings, depth int) image {
	var out image
	out.note(s)
	driver := s.value("driver")
	switch {
	case driver == "" || depth == maxGraphDepth:
		return out
	case filters[driver]:
	case formats[driver]:
		out.format = driver
	default:
		out.protocol = driver
		if isLocal(driver) {
			out.file = s.value("filename")
		}
		return out
	}
	out.standOn(g.below(s, depth+1))
	return out
}

// standOn completes what a node tells by what the node below it does.
func (im *image) standOn(below image) {
	im.protocol, im.file = below.protocol, below.file
	im.explicitBacking = im.explicitBacking || below.explicitBacking
	if im.format == "" {
		im.format = below.format
	}
	if im.discard == "" {
		im.discard = below.discard
	}
	if below.aio != "" {
		im.aio = below.aio
	}
}

// below tells of the node that a node stands on. What is found of a named one
// is kept: many may stand on it, and it may stand on itself.
func (g blockGraph) below(s settings, depth int) image {
	for _, key := range []string{"file", "image"} {
		if name, ok := s.get(key); ok {
			if _, known := g.images[name]; !known {
				g.images[name] = image{}
				g.images[name] = g.imageAt(g.nodes[name], depth)
			}
			return g.images[name]
		}
		if inline := s.child(key); inline != nil {
			return g.imageAt(inline, depth)
		}
	}
	return image{}
}

func isLocal(protocol string) bool {
	return protocol == "file" || protocol == "host_device" || protocol == "host_cdrom"
}

// blockdev describes the drive whose root node a -blockdev is.
func (g blockGraph) blockdev(s settings) Drive {
	im := g.image(s)
	if im.format == "" && im.protocol != "" {
		im.format = "raw" // nothing is probed: the guest sees the bytes of the file
	}
	return Drive{
		Node: s.value("node-name"), Interface: "none",
		File: im.file, Protocol: im.protocol, Format: im.format,
		ReadOnly: s.on("read-only"),
		AIO:      im.aio, Discard: im.discard, ExplicitBacking: im.explicitBacking,
	}
}

// legacyDrive describes a -drive. Its own keys come before those of a file
// name that describes nodes.
func (g blockGraph) legacyDrive(s settings) Drive {
	im := g.legacyImage(s)
	im.note(s)
	if v := discardMode(s); v != "" {
		im.discard = v
	}
	cdrom := s.value("media") == "cdrom"
	return Drive{
		Node: s.value("node-name"), Interface: s.value("if"),
		File: im.file, Protocol: im.protocol, Format: im.format,
		ReadOnly: cdrom || s.on("read-only") || s.on("readonly"),
		CDROM:    cdrom, Snapshot: s.on("snapshot"),
		AIO: im.aio, Discard: im.discard, ExplicitBacking: im.explicitBacking,
	}
}

// legacyImage finds what a -drive opens: file= is a file name here, and driver=
// and format= are the same.
func (g blockGraph) legacyImage(s settings) image {
	declared := s.value("format")
	if declared == "" {
		declared = s.value("driver")
	}
	name, named := s.get("file")
	if !named {
		im := g.image(append(s[:len(s):len(s)], setting{"driver", declared}))
		if declared == "" { // the format is probed, the protocol given
			im = g.image(s.child("file"))
		}
		return im
	}
	im := g.fileName(name)
	switch {
	case formats[declared]:
		im.format = declared
	case declared != "" && !filters[declared] && name != "":
		im.protocol, im.format = declared, "raw"
		if !isLocal(declared) {
			im.file = ""
		}
	}
	return im
}

// fileName reads QEMU's file name syntax (block.c, bdrv_fill_options): a JSON
// description, a protocol before a colon that comes before any slash, or a
// local file.
func (g blockGraph) fileName(name string) image {
	if name == "" {
		return image{}
	}
	if text, ok := strings.CutPrefix(name, "json:"); ok {
		s, err := parseJSONSettings(text)
		if err != nil {
			return image{}
		}
		return g.image(s)
	}
	i := strings.IndexAny(name, ":/")
	if i <= 0 || name[i] != ':' {
		return image{protocol: "file", file: name}
	}
	protocol, rest := name[:i], name[i+1:]
	switch {
	case isLocal(protocol):
		return image{protocol: protocol, file: rest}
	case protocol == "fat":
		protocol = "vvfat"
	}
	return image{protocol: protocol}
}

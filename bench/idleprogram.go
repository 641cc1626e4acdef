package main

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
)

// idleCode waits for a signal, again and again, on x86-64.
var idleCode = []byte{
	0xb8, 0x22, 0x00, 0x00, 0x00, // mov $34, %eax (pause)
	0x0f, 0x05, // syscall
	0xeb, 0xf7, // jmp to the begin
}

// idleProgram returns an executable that does nothing until it is killed,
// whatever its arguments are. It takes a page of memory, where one in Go would
// take megabytes: there are thousands of them.
func idleProgram() []byte {
	const (
		base    = 0x400000
		headers = 64 + 2*56
		page    = 0x1000
	)
	size := uint64(headers + len(idleCode))
	head := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Entry: base + headers, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 2,
	}
	copy(head.Ident[:], elf.ELFMAG)
	head.Ident[elf.EI_CLASS], head.Ident[elf.EI_DATA], head.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	segments := []elf.Prog64{
		{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: page},
		{Type: uint32(elf.PT_GNU_STACK), Flags: uint32(elf.PF_R | elf.PF_W), Align: 16},
	}
	var b bytes.Buffer
	for _, part := range []any{head, segments, idleCode} {
		if err := binary.Write(&b, binary.LittleEndian, part); err != nil {
			panic(err) // all of it has a fixed size
		}
	}
	return b.Bytes()
}

#!/bin/bash
# Builds the test guests in $VMSNAP_CACHE from what fetch.sh has fetched:
#   vmlinux               the kernel, unpacked: TCG would unpack it at each boot
#   initramfs-7.2.cpio    the guest's files with the guest agent of QEMU 7.2
#   initramfs-10.cpio     the same with that of QEMU 10
#   testvm.json           where all this is, for internal/testvm
set -euo pipefail

cache=${VMSNAP_CACHE:?}
work=$(mktemp -d "$cache/guest.XXXXXX")
trap 'rm -rf "$work"' EXIT

# In the order in which they depend on each other. A module for only some guests
# is followed by what they are called in internal/testvm/wire.
modules='
    drivers/virtio/virtio_ring
    drivers/virtio/virtio
    drivers/virtio/virtio_pci_legacy_dev
    drivers/virtio/virtio_pci_modern_dev
    drivers/virtio/virtio_pci
    drivers/block/virtio_blk
    drivers/char/virtio_console
    drivers/acpi/button
    drivers/input/evdev
    drivers/scsi/scsi_common scsi
    drivers/scsi/scsi_mod scsi
    drivers/scsi/sd_mod scsi
    drivers/scsi/virtio_scsi scsi
    drivers/scsi/scsi_common ide
    drivers/scsi/scsi_mod ide
    drivers/scsi/sd_mod ide
    drivers/ata/libata ide
    drivers/ata/ata_piix ide
    drivers/firmware/qemu_fw_cfg hook
'

# word FILE OFFSET SIZE: a little-endian number in a file.
word() { od -An -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '; }

# extract_kernel writes the ELF file that is packed in a bzImage. The places of
# the setup size, payload offset and payload length are those of the x86 boot
# protocol; the last four bytes of the payload are the unpacked size.
extract_kernel() {
    local image=$1 setup offset length
    setup=$(word "$image" $((0x1f1)) 1)
    offset=$(word "$image" $((0x248)) 4)
    length=$(word "$image" $((0x24c)) 4)
    head -c $(((setup + 1) * 512 + offset + length - 4)) "$image" |
        tail -c $((length - 4)) >"$work/payload.lz4"
    lz4 -q -d "$work/payload.lz4" "$2"
}

# add_program ROOT FILE: puts a program with the libraries that it needs into
# bin and their own places.
add_program() {
    local library
    install -D "$2" "$1/bin/$(basename "$2")"
    for library in $(ldd "$2" | grep -o '/[^ ]*'); do
        install -D "$library" "$1$library"
    done
}

make_root() {
    local root=$1 module for applet kernel
    mkdir -p "$root"/{bin,sbin,etc,dev,proc,sys,run,mnt,tmp,modules}
    CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$root/init" ./internal/testvm/guest
    install "$(command -v busybox)" "$root/bin/busybox"
    for applet in $("$root/bin/busybox" --list); do
        [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
    done
    kernel=$(echo "$cache"/kernel/lib/modules/*/kernel)
    while read -r module for; do
        # Without its signature, which is slow to verify under TCG.
        strip --strip-debug -o "$root/modules/$(basename "$module").ko" "$kernel/$module.ko"
        echo "$(basename "$module").ko" $for >>"$root/modules/list"
    done < <(awk NF <<<"$modules")
}

pack() { (cd "$1" && find . | sort | busybox cpio -o -H newc -R 0:0 >"$2"); }

extract_kernel "$cache"/kernel/boot/vmlinuz-* "$work/vmlinux"
for version in 7.2 10; do
    make_root "$work/$version"
    add_program "$work/$version" "$cache/agent-$version/usr/sbin/qemu-ga"
    pack "$work/$version" "$work/initramfs-$version.cpio"
done

cat >"$work/testvm.json" <<JSON
{
  "kernel": "vmlinux",
  "qemus": [
    {"name": "7.2", "binary": "/usr/bin/qemu-system-x86_64", "img": "/usr/bin/qemu-img",
     "initramfs": "initramfs-7.2.cpio"},
    {"name": "10", "binary": "qemu10/usr/bin/qemu-system-x86_64", "img": "qemu10/usr/bin/qemu-img",
     "data": ["qemu10/usr/share/qemu", "/usr/share/seabios"],
     "initramfs": "initramfs-10.cpio"}
  ]
}
JSON

# Each QEMU starts here and is what its name says.
check() {
    case $("$2" --version) in
    *" version $1."*) ;;
    *) echo "guest: $2 is not QEMU $1" >&2 && exit 1 ;;
    esac
}
check 7.2 /usr/bin/qemu-system-x86_64
check 10 "$cache/qemu10/usr/bin/qemu-system-x86_64"
check 7.2 /usr/bin/qemu-img
check 10 "$cache/qemu10/usr/bin/qemu-img"

mv "$work"/{vmlinux,initramfs-*.cpio,testvm.json} "$cache/"

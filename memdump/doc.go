// Package memdump saves the memory of a guest: strategies, the memory file,
// and what keeps a guest from harm meanwhile.
//
// # Saving
//
// [Probe] asks QEMU and the kernel what there is, [Choose] picks a [Strategy],
// [Predict] says what it will cost. [Prepare] notes the migration settings that
// the VM's owner has made, changes them, and gives QEMU the file's descriptor;
// the guest feels nothing. [Save.Cut] pauses the guest, has the caller cut the
// disks, and lets the guest go on as soon as its memory of that instant is
// certain to be saved. [Save.Wait] follows the rest, and [Save.Close] puts the
// settings back.
//
// With [Background] the pause lasts from stop to the moment from which QEMU
// tracks writes; with [Precopy] for the last pass of a live migration; with
// [Stopped] for the whole save. In all three the memory is that of the instant
// at which the disks were cut: no CPU of the guest ran in between.
//
// # The memory file
//
// [Create] makes a file with a header and reserved space. QEMU writes the
// stream straight into [File.Target], so that nothing of ours can hold it up.
// [File.Follow] runs beside it: it hashes what was written, has it brought to
// the disk early, and takes it out of the page cache. [File.Finish] makes the
// file complete and durable; until then every reader refuses it. [Verify]
// compares a file with its checksums, [Compress] makes it smaller after the
// save, [Encrypt] encrypts it to the recipient of a [Key], and [OpenStream] opens
// each form for a QEMU that loads it. A file that is to be encrypted says so in its
// header from the beginning, so that whoever finds or removes it plain knows.
//
// # Loading
//
// [Load] has a QEMU that was started with -incoming defer -S load a memory file,
// and follows it to the end. A load that fails is the end of that QEMU.
//
// # What may go wrong
//
// Before QEMU 8.1 a background save that ends early freezes the guest for good
// (write protection is never lifted). There it is only begun into a regular
// file whose space is reserved, and [Save.Cancel] lets it run to its end. Later
// versions can be cancelled.
//
// While the guest stands still a [Guard] in another process is armed, which
// resumes it if this process dies. Settings that were changed are handed to the
// caller before, so that whoever comes after can put them back
// ([Settings.Restore]) or take the save over ([Adopt]).
//
// Should a save have frozen a guest all the same, another client's or one whose
// disk went bad, [Stuck] recognises it from outside, also when QEMU does not
// answer any more, and [Rescue] ends it.
//
// # Huge pages
//
// Tracking writes splits the transparent huge pages of the guest's memory for
// good, which makes the guest slower and the pause of the next save longer.
// [QueryHugePages] notes before a save what there is, and [Collapse] puts it
// back afterwards, from outside and for little CPU time.
//
// # Concurrency
//
// A [Save] is for one goroutine; it runs none of its own. A [File] may be
// followed while QEMU writes it. What looks at processes from outside may be
// called from any goroutine.
package memdump

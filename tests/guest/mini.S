// The smallest guests, for start-up figures: `out` is the first instruction. With DISK, one disk
// sector is read by polling before the end; the guest ends by port 0x64, else a triple fault.
//
// Marks: a byte to port 0x80 for kvm tracepoints (1 first instruction, 2 disk read), then the same
// as a digit to the serial port, for who has none.
	.section .text.start, "ax"
	.globl start64, start_pvh
#define BODY_BITS 64
	.code64
start64:
	movb	$1, %al
	outb	%al, $0x80
	movb	$'1', %al
	movw	$0x3f8, %dx
	outb	%al, %dx
#ifdef DISK
	movq	%rsi, %rbx
	movl	0x228(%rbx), %esi // cmd_line_ptr
	call	read_disk
#endif
	movb	$0xfe, %al
	outb	%al, $0x64
	lidt	nothing
	ud2

#ifdef DISK
#define FUNCTION read_disk
#include "mini_disk.inc"
#undef FUNCTION
#endif

	.code32
start_pvh:
	movb	$1, %al
	outb	%al, $0x80
	movb	$'1', %al
	movw	$0x3f8, %dx
	outb	%al, %dx
#ifdef DISK
	movl	$stack_top, %esp
	movl	24(%ebx), %esi // cmdline_paddr
	call	read_disk32
#endif
	movb	$0xfe, %al
	outb	%al, $0x64
	lidt	nothing
	ud2

#ifdef DISK
#define FUNCTION read_disk32
#include "mini_disk.inc"
#endif

	.balign	8
nothing: .quad 0, 0
#ifdef DISK
	// The command line says where the transports are: virtio_mmio.device=512@0xADDRESS:IRQ
	.balign 16
desc:	.quad	header
	.long	16
	.word	1, 1
	.quad	sector
	.long	512
	.word	3, 2
	.quad	status
	.long	1
	.word	2, 0
avail:	.word	1, 1, 0 // no interrupt; one request: descriptor 0
	.balign 16
header:	.long	0, 0, 0, 0
needle:	.ascii	"virtio_mmio.device="
needle_end:

	.bss
	.balign	16
used:	.skip	64
status:	.skip	16
sector:	.skip	512
	.skip	256
stack_top:
#endif

	.section .note.pvh, "a", @note
	.balign	4
	.long	4, 4, 18
	.asciz	"Xen"
	.long	start_pvh
	.section .note.GNU-stack, "", @progbits

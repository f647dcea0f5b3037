# A boot sector for tests: reads sector 1 of the disk it came from, prints it (up to a zero
# byte) to the debug console, writes it to sector 2, and ends QEMU through isa-debug-exit:
# status 3 for success, 5 for a BIOS call that failed.
	.code16
	.globl _start
_start:
	xor %ax, %ax
	mov %ax, %ds
	mov $packet, %si
	mov $0x42, %ah          # INT 13h extensions: read; DL is the boot disk
	int $0x13
	jc failed
	mov $0x7e00, %si
print:
	lodsb
	test %al, %al
	jz printed
	out %al, $0xe9
	jmp print
printed:
	movb $2, packet + 8
	mov $packet, %si
	mov $0x4300, %ax        # write without verification
	int $0x13
	jc failed
	mov $1, %al
	out %al, $0xf4
failed:
	mov $2, %al
	out %al, $0xf4
halt:
	hlt
	jmp halt
packet:
	.byte 16, 0
	.word 1                 # sectors
	.word 0x7e00, 0         # to 0000:7e00
	.quad 1                 # first sector
	.org 510
	.word 0xaa55

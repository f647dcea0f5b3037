// Entry points (PVH, 64-bit boot protocol, application processors), page tables, IDT stubs and
// the way to CPL3 and back.
#define MAX_CPUS 256
#define STACK_SIZE 8192

	.section .text.start, "ax"
	// First byte of the image: a flat image is entered here, in long mode, rsi = zero page.
	.code64
	.globl start64
start64:
	cli
	cld
	movq	%rsi, boot_zero_page
	movl	$pml4, %eax
	movq	%rax, %cr3
	lgdt	gdt_pointer
	movl	$stacks + STACK_SIZE, %esp
	pushq	$0x08
	pushq	$start_common
	lretq

	.globl start_pvh
	.code32
start_pvh:
	cli
	cld
	movl	%ebx, boot_pvh
	lgdt	gdt_pointer
	movl	$enter_c, %ebx
	movl	$stacks + STACK_SIZE, %esp
to_long_mode: // to ebx, on stack esp
	movl	%cr4, %eax
	orl	$0x620, %eax // PAE, OSFXSR, OSXMMEXCPT
	movl	%eax, %cr4
	movl	$pml4, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx
	rdmsr
	orl	$0x100, %eax // LME
	wrmsr
	movl	%cr0, %eax
	andl	$~0x6000000c, %eax // cache on, no FPU emulation
	orl	$0x80000003, %eax
	movl	%eax, %cr0
	ljmp	$0x08, $long_mode

	.code64
long_mode:
	movl	$0x10, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	%esp, %esp
	movl	%ebx, %ebx
	jmp	*%rbx

start_common:
	movl	$0x10, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movq	%cr4, %rax
	orl	$0x600, %eax
	movq	%rax, %cr4
enter_c:
	movl	$bss_start, %edi
	movl	$bss_words, %ecx
	xorl	%eax, %eax
	rep stosq
	movq	%rax, stacks // CPU 0
	call	kernel_main
1:	cli
	hlt
	jmp	1b

	// ---- application processors: copied to 0x8000 ------------------------------------------
	.globl trampoline_start, trampoline_end
	.code16
trampoline_start:
	cli
	cld
	xorw	%ax, %ax
	movw	%ax, %ds
	lgdtl	0x8000 + trampoline_gdt - trampoline_start
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$0x18, $ap_protected
	.balign	8
trampoline_gdt:
	.word	gdt_head_end - gdt - 1
	.long	gdt
trampoline_end:

	.code32
ap_protected:
	movl	$0x20, %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	$1, %ebp
	lock xaddl %ebp, ap_next
	cmpl	$MAX_CPUS, %ebp
	jae	2f
	movl	%ebp, %esp
	incl	%esp
	imull	$STACK_SIZE, %esp, %esp
	addl	$stacks, %esp
	movl	$ap_long, %ebx
	jmp	to_long_mode
2:	hlt
	jmp	2b

	.code64
ap_long:
	movl	%ebp, %edi
	movq	%rdi, -STACK_SIZE(%rsp)
	xorl	%ebp, %ebp
	call	ap_main
3:	cli
	hlt
	jmp	3b

	// ---- contexts ------------------------------------------------------------------------------
	.text
	.globl save_context, restore_context
save_context:
	movq	%rbx, 0(%rdi)
	movq	%rbp, 8(%rdi)
	movq	%r12, 16(%rdi)
	movq	%r13, 24(%rdi)
	movq	%r14, 32(%rdi)
	movq	%r15, 40(%rdi)
	leaq	8(%rsp), %rax
	movq	%rax, 48(%rdi)
	movq	(%rsp), %rax
	movq	%rax, 56(%rdi)
	xorl	%eax, %eax
	ret

restore_context:
	movq	0(%rdi), %rbx
	movq	8(%rdi), %rbp
	movq	16(%rdi), %r12
	movq	24(%rdi), %r13
	movq	32(%rdi), %r14
	movq	40(%rdi), %r15
	movq	48(%rdi), %rsp
	movl	%esi, %eax
	jmp	*56(%rdi)

	// u64 enter_user(function, a, b, c, d, stack, u64 *rsp0, struct context *context):
	// call function(a, b, c, d) at CPL3. The ISR comes back by restore_context; the result is
	// in the context's CPU (see run_user).
	.globl enter_user, user_exit
enter_user:
	movq	8(%rsp), %rax
	movq	16(%rsp), %r10
	movq	%rbx, 0(%r10)
	movq	%rbp, 8(%r10)
	movq	%r12, 16(%r10)
	movq	%r13, 24(%r10)
	movq	%r14, 32(%r10)
	movq	%r15, 40(%r10)
	leaq	8(%rsp), %r11
	movq	%r11, 48(%r10)
	movq	(%rsp), %r11
	movq	%r11, 56(%r10)
	leaq	-256(%rsp), %r11
	andq	$~15, %r11
	movq	%r11, (%rax) // interrupts from CPL3 start below our own frame
	pushq	$0x33        // ss
	pushq	%r9          // rsp
	pushq	$0x202       // rflags: interrupts on
	pushq	$0x2b        // cs
	pushq	$user_entry
	movq	%rdi, %rax
	movq	%rsi, %rdi
	movq	%rdx, %rsi
	movq	%rcx, %rdx
	movq	%r8, %rcx
	iretq
user_entry:
	call	*%rax
user_exit:
	ud2

	// ---- interrupt stubs -------------------------------------------------------------------------
	.balign	16
	.globl interrupt_stubs
interrupt_stubs:
	.set	vector, 0
	.rept	256
	.balign	16
	.if	!(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
	pushq	$0
	.endif
	pushq	$vector
	jmp	interrupt_common
	.set	vector, vector + 1
	.endr

interrupt_common:
	pushq	%rax
	pushq	%rbx
	pushq	%rcx
	pushq	%rdx
	pushq	%rsi
	pushq	%rdi
	pushq	%rbp
	pushq	%r8
	pushq	%r9
	pushq	%r10
	pushq	%r11
	pushq	%r12
	pushq	%r13
	pushq	%r14
	pushq	%r15
	cld
	movq	%rsp, %rdi
	movq	%rsp, %rbx
	andq	$~15, %rsp
	call	interrupt
	movq	%rbx, %rsp
	popq	%r15
	popq	%r14
	popq	%r13
	popq	%r12
	popq	%r11
	popq	%r10
	popq	%r9
	popq	%r8
	popq	%rbp
	popq	%rdi
	popq	%rsi
	popq	%rdx
	popq	%rcx
	popq	%rbx
	popq	%rax
	addq	$16, %rsp
	iretq

	// ---- data --------------------------------------------------------------------------------------
	.data
	.globl boot_pvh, boot_zero_page, ap_next
	.balign	8
boot_pvh:	.quad 0
boot_zero_page:	.quad 0
ap_next:	.long 1
gdt_pointer:
	.word	gdt_end - gdt - 1
	.quad	gdt
	.balign	16
	.globl gdt
gdt:
	.quad	0
	.quad	0x00af9b000000ffff // 0x08 code, CPL0, 64 bits
	.quad	0x00cf93000000ffff // 0x10 data, CPL0
	.quad	0x00cf9b000000ffff // 0x18 code, CPL0, 32 bits
	.quad	0x00cf93000000ffff // 0x20 data, CPL0, 32 bits
	.quad	0x00affb000000ffff // 0x28 code, CPL3, 64 bits
	.quad	0x00cff3000000ffff // 0x30 data, CPL3
gdt_head_end:
	.quad	0
	.fill	2 * MAX_CPUS, 8, 0 // 0x40: the TSS of each CPU
gdt_end:

	// Identity map of the first 4 GiB, open to CPL3; more is added where it is needed.
	.balign	4096
	.globl pml4, pdpt
pml4:
	.quad	pdpt + 7
	.fill	511, 8, 0
pdpt:
	.quad	page_directories + 7
	.quad	page_directories + 0x1007
	.quad	page_directories + 0x2007
	.quad	page_directories + 0x3007
	.fill	508, 8, 0
page_directories:
	.set	page, 0
	.rept	2048
	.quad	page + 0x87
	.set	page, page + 0x200000
	.endr

	.section .bss.big, "aw", @nobits
	.balign	STACK_SIZE
	.globl stacks
stacks:
	.skip	MAX_CPUS * STACK_SIZE

#ifdef PVH
	.section .note.pvh, "a", @note
	.balign	4
	.long	4, 4, 18 // name's size, value's size, XEN_ELFNOTE_PHYS32_ENTRY
	.asciz	"Xen"
	.long	start_pvh
#endif
	.section .note.GNU-stack, "", @progbits

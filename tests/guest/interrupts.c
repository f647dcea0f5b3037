// IDT, TSS, LAPIC (x2APIC where there is one), IOAPIC, the LAPIC's timer, and calls to CPL3.
#include "guest.h"

#define IOAPIC 0xfec00000ull
#define XAPIC 0xfee00000ull
#define APIC_BASE_MSR 0x1b
#define TSC_DEADLINE_MSR 0x6e0
#define X2APIC_MSR 0x800
#define APIC_ID 0x02
#define APIC_EOI 0x0b
#define APIC_SPURIOUS 0x0f
#define APIC_ICR 0x30
#define APIC_ICR_HIGH 0x31
#define APIC_TIMER 0x32
#define APIC_TIMER_INITIAL 0x38
#define APIC_TIMER_DIVIDE 0x3e
#define TIMER_PERIODIC (1u << 17)
#define TIMER_DEADLINE (2u << 17)
#define TIMER_MASKED (1u << 16)
#define UD 6
#define FIRST_TSS 8 // index in the GDT

struct gate {
	u16 low, selector, flags, middle;
	u32 high, zero;
};
struct tss {
	u32 reserved;
	u64 rsp[3];
	u64 ist[8];
	u64 reserved2;
	u16 reserved3, io_bitmap;
} __attribute__((packed));
struct cpu {
	u64 *rsp0; // in tss, which is packed but used on x86 alone: unaligned stores are fine
	struct tss tss;
	struct context user;
	u64 result;
};

volatile u64 interrupt_count[256];
void (*interrupt_handler[256])(u32 vector);
struct context command_context;
static BIG struct cpu cpus[MAX_CPUS];
static BIG u8 user_stacks[MAX_CPUS][4096] __attribute__((aligned(4096)));
static struct gate idt[256] __attribute__((aligned(16)));
static bool x2apic;

u64 lapic_read(u32 reg)
{
	return x2apic ? rdmsr(X2APIC_MSR + reg) : read32(XAPIC + reg * 16);
}

void lapic_write(u32 reg, u64 value)
{
	if (x2apic)
		wrmsr(X2APIC_MSR + reg, value);
	else
		write32(XAPIC + reg * 16, (u32)value);
}

u32 lapic_id(void)
{
	u64 id = lapic_read(APIC_ID);

	return (u32)(x2apic ? id : id >> 24);
}

void lapic_command(u32 destination, u32 command)
{
	if (x2apic) {
		lapic_write(APIC_ICR, (u64)destination << 32 | command);
		return;
	}
	lapic_write(APIC_ICR_HIGH, (u64)destination << 24);
	lapic_write(APIC_ICR, command);
}

static _Noreturn void trap(struct frame *f)
{
	u64 cr2;

	asm volatile("mov %%cr2, %0" : "=r"(cr2));
	print("fail trap vector=%u error=0x%x rip=0x%x cs=0x%x cr2=0x%x\n", f->vector, f->error,
	      f->rip, f->cs, cr2);
	if (this_cpu())
		for (;;)
			asm volatile("cli; hlt");
	restore_context(&command_context, 1);
}

void interrupt(struct frame *f)
{
	struct cpu *cpu = &cpus[this_cpu()];

	if (f->vector == UD && f->cs == 0x2b && f->rip == (u64)user_exit) {
		cpu->result = f->rax;
		restore_context(&cpu->user, 0);
	}
	if (f->vector < 32)
		trap(f);
	__atomic_add_fetch(&interrupt_count[f->vector], 1, __ATOMIC_SEQ_CST);
	if (interrupt_handler[f->vector])
		interrupt_handler[f->vector]((u32)f->vector);
	if (f->vector != VECTOR_SPURIOUS)
		lapic_write(APIC_EOI, 0);
}

static void set_gate(u32 vector)
{
	u64 address = (u64)interrupt_stubs + vector * STUB_SIZE;

	idt[vector] = (struct gate){ (u16)address, 0x08, 0x8e00, (u16)(address >> 16), 0, 0 };
}

void cpu_init(u32 number)
{
	struct cpu *cpu = &cpus[number];
	struct __attribute__((packed)) {
		u16 limit;
		u64 base;
	} pointer = { sizeof(idt) - 1, (u64)idt }, gdt_full = { (8 + 2 * MAX_CPUS) * 8 - 1, (u64)gdt };
	u64 base = (u64)&cpu->tss;
	u32 r[4];

	memset(&cpu->tss, 0, sizeof(cpu->tss));
	cpu->rsp0 = (u64 *)((u64)&cpu->tss + offsetof(struct tss, rsp));
	cpu->tss.io_bitmap = sizeof(struct tss);
	cpu->tss.rsp[0] = ((u64)&r & ~(u64)(STACK_SIZE - 1)) + STACK_SIZE;
	gdt[FIRST_TSS + 2 * number] = (sizeof(struct tss) - 1) | (base & 0xffffff) << 16 |
				      0x89ull << 40 | (base >> 24 & 0xff) << 56;
	gdt[FIRST_TSS + 2 * number + 1] = base >> 32;
	asm volatile("lgdt %0; lidt %1" ::"m"(gdt_full), "m"(pointer));
	asm volatile("ltr %w0" ::"r"((FIRST_TSS + 2 * number) * 8));
	cpuid(1, 0, r);
	x2apic = r[2] >> 21 & 1;
	wrmsr(APIC_BASE_MSR, rdmsr(APIC_BASE_MSR) | 0x800 | (x2apic ? 0x400 : 0));
	lapic_write(APIC_SPURIOUS, 0x100 | VECTOR_SPURIOUS);
}

void interrupts_init(void)
{
	for (u32 vector = 0; vector < 32; vector++)
		set_gate(vector);
	set_gate(VECTOR_TIMER);
	set_gate(VECTOR_IPI);
	set_gate(VECTOR_SPURIOUS);
	outb(0x21, 0xff); // no interrupt by the PICs
	outb(0xa1, 0xff);
	cpu_init(0);
	asm volatile("sti");
}

void gsi_enable(u32 gsi, void (*handler)(u32 vector))
{
	u32 vector = VECTOR_GSI + gsi;

	interrupt_handler[vector] = handler;
	set_gate(vector);
	write32(IOAPIC, 0x10 + 2 * gsi + 1);
	write32(IOAPIC + 0x10, lapic_id() << 24);
	write32(IOAPIC, 0x10 + 2 * gsi);
	write32(IOAPIC + 0x10, vector); // edge, active high, fixed
}

static void timer(u32 mode, u64 nanoseconds)
{
	lapic_write(APIC_TIMER_DIVIDE, 0x0b); // by 1: KVM's LAPIC bus runs at 1 GHz
	lapic_write(APIC_TIMER, mode | VECTOR_TIMER);
	if (mode != TIMER_DEADLINE)
		lapic_write(APIC_TIMER_INITIAL, nanoseconds > 0xffffffff ? 0xffffffff : nanoseconds);
}

void timer_oneshot(u64 nanoseconds) { timer(0, nanoseconds); }
void timer_periodic(u64 nanoseconds) { timer(TIMER_PERIODIC, nanoseconds); }

void timer_stop(void)
{
	lapic_write(APIC_TIMER_INITIAL, 0);
	lapic_write(APIC_TIMER, TIMER_MASKED | VECTOR_TIMER);
}

bool timer_deadline(u64 nanoseconds)
{
	u32 r[4];

	cpuid(1, 0, r);
	if (!(r[2] >> 24 & 1))
		return false;
	timer(TIMER_DEADLINE, 0);
	barrier();
	wrmsr(TSC_DEADLINE_MSR, rdtsc() + nanoseconds * 1000000 / (cycles_to_ns(1000000) + 1));
	return true;
}

bool wait_change(volatile u64 *counter, u64 old, u64 deadline)
{
	u64 now = clock_ns();

	if (now >= deadline)
		return false;
	asm volatile("cli" ::: "memory");
	if (!counter || *counter == old) {
		timer_oneshot(deadline - now);
		asm volatile("sti; hlt" ::: "memory");
	}
	asm volatile("sti" ::: "memory");
	return true;
}

u64 run_user(void *function, u64 a, u64 b, u64 c, u64 d)
{
	u32 number = this_cpu();
	struct cpu *cpu = &cpus[number];

	enter_user(function, a, b, c, d, (u64)user_stacks[number] + 4096 - 64, cpu->rsp0,
		   &cpu->user);
	asm volatile("sti" ::: "memory"); // we come back by an interrupt gate
	return cpu->result;
}

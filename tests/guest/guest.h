// The bare-metal test guest: a CPL0 kernel of a few hundred lines with a CPL3 workload.
//
// Where KVM has no hardware virtualization, CPL0 code is emulated at some 4 million instructions
// a second and CPL3 code runs natively. So whatever loops over memory runs at CPL3 (run_user),
// and the kernel keeps to instructions that KVM's emulator knows (-mgeneral-regs-only).
#pragma once

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define MAX_CPUS 256
#define STACK_SIZE 8192 // a power of two: the CPU's number is at its bottom
#define BIG __attribute__((section(".bss.big"))) // never cleared, not in the file
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

#define NSEC_PER_MS 1000000ull

// ---- entry.S ----------------------------------------------------------------------------------
struct context {
	u64 rbx, rbp, r12, r13, r14, r15, rsp, rip;
};
int save_context(struct context *context); // returns again with a value by:
_Noreturn void restore_context(struct context *context, int value);
u64 enter_user(void *function, u64 a, u64 b, u64 c, u64 d, u64 stack, u64 *rsp0,
	       struct context *context);
extern u8 user_exit[]; // the ud2 that ends a CPL3 call
extern u8 interrupt_stubs[];
#define STUB_SIZE 16
extern u8 trampoline_start[], trampoline_end[];
extern u64 pml4[], pdpt[], gdt[];
extern u64 boot_pvh, boot_zero_page; // the one that isn't 0 tells how we were started

struct frame {
	u64 r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax;
	u64 vector, error, rip, cs, rflags, rsp, ss;
};

// ---- small inline instructions ------------------------------------------------------------------
static inline void outb(u16 port, u8 value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline u8 inb(u16 port)
{
	u8 value;
	asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}
static inline void write32(u64 address, u32 value)
{
	asm volatile("movl %0, (%1)" ::"r"(value), "r"(address) : "memory");
}
static inline u32 read32(u64 address)
{
	u32 value;
	asm volatile("movl (%1), %0" : "=r"(value) : "r"(address) : "memory");
	return value;
}
static inline u8 read8(u64 address)
{
	u8 value;
	asm volatile("movb (%1), %0" : "=q"(value) : "r"(address) : "memory");
	return value;
}
static inline void write8(u64 address, u8 value)
{
	asm volatile("movb %0, (%1)" ::"q"(value), "r"(address) : "memory");
}
static inline u64 rdtsc(void)
{
	u32 low, high;
	asm volatile("lfence; rdtsc" : "=a"(low), "=d"(high)::"memory");
	return (u64)high << 32 | low;
}
static inline u64 rdmsr(u32 index)
{
	u32 low, high;
	asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
	return (u64)high << 32 | low;
}
static inline void wrmsr(u32 index, u64 value)
{
	asm volatile("wrmsr" ::"c"(index), "a"((u32)value), "d"((u32)(value >> 32)) : "memory");
}
static inline void cpuid(u32 leaf, u32 sub, u32 *r)
{
	asm volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
}
static inline void barrier(void) { asm volatile("mfence" ::: "memory"); }
static inline u32 this_cpu(void)
{
	u64 rsp;
	asm("mov %%rsp, %0" : "=r"(rsp));
	return *(u32 *)(rsp & ~(u64)(STACK_SIZE - 1));
}

// ---- serial.c -----------------------------------------------------------------------------------
void serial_init(void);
void serial_enable_input(void);
int serial_get(void); // a byte, or -1
void print(const char *format, ...); // %s %c %u %x, all numbers are 64 bits wide
u64 parse_number(const char *text, const char **end);
int compare(const char *a, const char *b);
bool starts_with(const char *text, const char *prefix);

// ---- interrupts.c -------------------------------------------------------------------------------
#define VECTOR_TIMER 0x30
#define VECTOR_IPI 0x31
#define VECTOR_GSI 0x40
#define VECTOR_SPURIOUS 0xff
extern volatile u64 interrupt_count[256];
extern void (*interrupt_handler[256])(u32 vector);
extern struct context command_context; // where a trap in a command returns to
void interrupts_init(void);
void cpu_init(u32 cpu); // IDT, TSS, LAPIC of the CPU that runs it
void gsi_enable(u32 gsi, void (*handler)(u32 vector));
u32 lapic_id(void);
u64 lapic_read(u32 reg);
void lapic_write(u32 reg, u64 value);
void lapic_command(u32 destination, u32 command);
void timer_oneshot(u64 nanoseconds);
void timer_periodic(u64 nanoseconds);
void timer_stop(void);
bool timer_deadline(u64 nanoseconds); // by TSC deadline; false if the CPU has none
// Sleep until some interrupt, not at all if *counter isn't `old` any more; false once `deadline`
// (clock_ns) has passed. To be called in a loop.
bool wait_change(volatile u64 *counter, u64 old, u64 deadline);
u64 run_user(void *function, u64 a, u64 b, u64 c, u64 d);

// ---- clock.c ------------------------------------------------------------------------------------
bool clock_init(void);
u64 clock_ns(void);
u64 cycles_to_ns(u64 cycles);
void sleep_ns(u64 nanoseconds);

// ---- platform.c: what the loader and the firmware tables say -------------------------------------
const char *command_line(void);
void mem_command(void);
void initrd_command(void);
void acpi_command(void);
void mptable_command(void);
u32 firmware_cpus(void);
bool acpi_power_off(void);
bool acpi_reset(void);

// ---- smp.c --------------------------------------------------------------------------------------
u32 smp_start(void); // CPUs that run, this one included
void smp_command(int argc, u64 *argv);
void smp_lock_command(int argc, u64 *argv);
void smp_ipi_command(int argc, u64 *argv);
void smp_work_command(int argc, u64 *argv);
void smp_cpuid_command(int argc, u64 *argv);
void ap_main(u32 cpu);

// ---- blk.c, blk_hostile.c -------------------------------------------------------------------------
void blk_probe(void);
bool blk_command(int argc, char **words, u64 *argv);
bool blk_hostile(u32 device, const char *kind);

// ---- rng.c, console.c, balloon.c, net_commands.c: false if the command is none of theirs ------------
bool rng_command(int argc, char **words, u64 *argv);
bool console_command(int argc, char **words, u64 *argv);
bool balloon_command(int argc, char **words, u64 *argv);
bool net_command(int argc, char **words, u64 *argv);
void net_probe(void); // net.c

// ---- user.c: runs at CPL3, natively ---------------------------------------------------------------
u64 user_fill(u64 *buffer, u64 words, u64 first, u64 seed);
u64 user_check(const u64 *buffer, u64 words, u64 first, u64 seed); // index of a wrong word, or ~0
u64 user_crc32(const u8 *data, u64 length);
u64 user_zero(u64 *buffer, u64 words);
u64 user_is_zero(const u64 *buffer, u64 words); // index of a word that isn't 0, or ~0
u64 user_sort(u64 *values, u64 count);
u64 user_spin(u64 rounds);

void *memset(void *to, int value, size_t length);
void *memcpy(void *to, const void *from, size_t length);
int memcmp(const void *a, const void *b, size_t length);

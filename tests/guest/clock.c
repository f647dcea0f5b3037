// kvmclock, and what follows from it: TSC cycles to nanoseconds, sleep.
#include "guest.h"

#define CLOCK_MSR 0x4b564d01
#define KVM_LEAF 0x40000000
#define CLOCKSOURCE2 (1u << 3)

static volatile struct {
	u32 version, padding;
	u64 tsc, system;
	u32 multiplier;
	int8_t shift;
	u8 flags, padding2[2];
} page __attribute__((aligned(64)));

bool clock_init(void)
{
	u32 r[4];

	cpuid(KVM_LEAF, 0, r);
	if (r[1] != 0x4b4d564b) // "KVMK"
		return false;
	cpuid(KVM_LEAF + 1, 0, r);
	if (!(r[0] & CLOCKSOURCE2))
		return false;
	wrmsr(CLOCK_MSR, (u64)&page | 1);
	return true;
}

u64 cycles_to_ns(u64 cycles)
{
	if (!page.multiplier)
		return cycles / 2; // no kvmclock: a guess, only time-outs depend on it
	cycles = page.shift >= 0 ? cycles << page.shift : cycles >> -page.shift;
	return (u64)((unsigned __int128)cycles * page.multiplier >> 32);
}

u64 clock_ns(void)
{
	u64 result;
	u32 version;

	do {
		version = page.version;
		barrier();
		result = page.system + cycles_to_ns(rdtsc() - page.tsc);
		barrier();
	} while (version & 1 || version != page.version);
	return result;
}

void sleep_ns(u64 nanoseconds)
{
	u64 end = clock_ns() + nanoseconds;

	while (wait_change(NULL, 0, end))
		;
	timer_stop();
}

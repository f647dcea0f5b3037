// Application processors: INIT and SIPI to all, then jobs that every CPU runs.
#include "guest.h"

#define TRAMPOLINE 0x8000
#define ICR_INIT_ALL 0xc4500 // to all but self
#define ICR_SIPI_ALL 0xc4600
#define ICR_FIXED 0x4000

extern volatile u32 ap_next;
static volatile u32 running; // application processors in ap_main
static void (*volatile job)(u32 cpu);
static volatile u32 job_number, job_done;
static volatile u64 job_argument;
static u32 apic_ids[MAX_CPUS];
static volatile u64 counter, plain_counter;
static volatile u32 lock;
static u64 results[MAX_CPUS];

void ap_main(u32 cpu)
{
	u32 seen = 0;

	cpu_init(cpu);
	apic_ids[cpu] = lapic_id();
	__atomic_add_fetch(&running, 1, __ATOMIC_SEQ_CST);
	for (;;) {
		asm volatile("cli" ::: "memory");
		if (job_number == seen) {
			asm volatile("sti; hlt" ::: "memory");
			continue;
		}
		asm volatile("sti" ::: "memory");
		seen = job_number;
		job(cpu);
		__atomic_add_fetch(&job_done, 1, __ATOMIC_SEQ_CST);
	}
}

u32 smp_start(void)
{
	u32 expected = firmware_cpus();
	u64 deadline = clock_ns() + 10000 * NSEC_PER_MS;

	if (running)
		return running + 1;
	if (expected <= 1)
		return 1;
	memcpy((void *)TRAMPOLINE, trampoline_start, (size_t)(trampoline_end - trampoline_start));
	apic_ids[0] = lapic_id();
	lapic_command(0, ICR_INIT_ALL);
	sleep_ns(NSEC_PER_MS);
	lapic_command(0, ICR_SIPI_ALL | TRAMPOLINE >> 12);
	while (running + 1 < expected && clock_ns() < deadline)
		sleep_ns(NSEC_PER_MS);
	return running + 1;
}

static bool run_everywhere(void (*function)(u32 cpu), u64 argument)
{
	u32 others = smp_start() - 1;
	u64 deadline = clock_ns() + 20000 * NSEC_PER_MS;

	job = function;
	job_argument = argument;
	job_done = 0;
	barrier();
	job_number++;
	for (u32 cpu = 1; cpu <= others; cpu++)
		lapic_command(apic_ids[cpu], ICR_FIXED | VECTOR_IPI);
	function(0);
	while (job_done < others && clock_ns() < deadline)
		sleep_ns(NSEC_PER_MS / 4);
	return job_done == others;
}

void smp_command(int argc, u64 *argv)
{
	u32 expected = firmware_cpus(), count = smp_start();
	u32 largest = 0;

	for (u32 cpu = 0; cpu < count; cpu++) {
		for (u32 other = 0; count <= 16 && other < cpu; other++)
			if (apic_ids[other] == apic_ids[cpu])
				print("note two CPUs have the id %u\n", (u64)apic_ids[cpu]);
		if (apic_ids[cpu] > largest)
			largest = apic_ids[cpu];
	}
	print("%s smp cpus=%u of=%u largest-id=%u\n", count == expected ? "ok" : "fail", (u64)count,
	      (u64)expected, (u64)largest);
}

static void count_job(u32 cpu)
{
	for (u64 i = 0; i < job_argument; i++) {
		__atomic_add_fetch(&counter, 1, __ATOMIC_SEQ_CST);
		while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
			asm volatile("pause");
		plain_counter++;
		__atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
	}
}

void smp_lock_command(int argc, u64 *argv)
{
	u64 rounds = argc > 1 ? argv[1] : 200, wanted = rounds * smp_start();
	bool finished;

	counter = plain_counter = 0;
	finished = run_everywhere(count_job, rounds);
	print("%s smp.lock atomic=%u locked=%u wanted=%u\n",
	      finished && counter == wanted && plain_counter == wanted ? "ok" : "fail", counter,
	      plain_counter, wanted);
}

static u32 cpuid_answers[MAX_CPUS][4];

static void cpuid_job(u32 cpu)
{
	cpuid((u32)job_argument, (u32)(job_argument >> 32), cpuid_answers[cpu]);
}

// smp.cpuid LEAF [SUBLEAF]: what every CPU is told.
void smp_cpuid_command(int argc, u64 *argv)
{
	u32 count = smp_start();
	bool finished = run_everywhere(cpuid_job, argv[1] | (argc > 2 ? argv[2] << 32 : 0));

	for (u32 cpu = 0; cpu < count; cpu++) {
		const u32 *r = cpuid_answers[cpu];

		print("note id=%u 0x%x 0x%x 0x%x 0x%x\n", (u64)apic_ids[cpu], (u64)r[0], (u64)r[1],
		      (u64)r[2], (u64)r[3]);
	}
	print("%s smp.cpuid cpus=%u\n", finished ? "ok" : "fail", (u64)count);
}

static void work_job(u32 cpu) { results[cpu] = run_user(user_spin, job_argument, 0, 0, 0); }

void smp_work_command(int argc, u64 *argv)
{
	u32 count = smp_start(), right = 0;
	u64 begin = clock_ns();
	bool finished = run_everywhere(work_job, argc > 1 ? argv[1] : 1000000);

	for (u32 cpu = 0; cpu < count; cpu++)
		right += results[cpu] == results[0];
	print("%s smp.work cpus=%u right=%u us=%u\n", finished && right == count ? "ok" : "fail",
	      (u64)count, (u64)right, (clock_ns() - begin) / 1000);
}

void smp_ipi_command(int argc, u64 *argv)
{
	u64 rounds = argc > 1 ? argv[1] : 100, lost = 0, wanted;
	u32 count = smp_start();

	if (count < 2) {
		print("fail smp.ipi one CPU\n");
		return;
	}
	for (u64 i = 0; i < rounds; i++) {
		u64 deadline = clock_ns() + 1000 * NSEC_PER_MS;

		wanted = interrupt_count[VECTOR_IPI] + 1;
		lapic_command(apic_ids[1 + i % (count - 1)], ICR_FIXED | VECTOR_IPI);
		while (interrupt_count[VECTOR_IPI] < wanted && clock_ns() < deadline)
			asm volatile("pause");
		lost += interrupt_count[VECTOR_IPI] != wanted;
	}
	print("%s smp.ipi sent=%u lost=%u\n", lost ? "fail" : "ok", rounds, lost);
}

// The script channel: commands from `script=` on the command line, then lines from the serial
// port. A command answers with one line, `ok …` or `fail …`; lines with `note …` may precede it.
// On the command line, `;` ends a command and `,` separates its words.
#include "guest.h"

#define MAX_WORDS 10
#define MAX_SAMPLES 20000

static char line[4096];
static BIG u64 samples[MAX_SAMPLES];

static void echo_command(int argc, u64 *argv) { print("ok echo\n"); }

static void ping(int argc, u64 *argv, bool port)
{
	u64 rounds = argc > 2 ? argv[2] : 1000;

	if (rounds > MAX_SAMPLES)
		rounds = MAX_SAMPLES;
	for (u64 i = 0; i < rounds; i++) {
		u64 begin = rdtsc();

		if (port)
			inb((u16)argv[1]);
		else
			read32(argv[1]);
		samples[i] = rdtsc() - begin;
	}
	run_user(user_sort, (u64)samples, rounds, 0, 0);
	print("ok ping rounds=%u min=%u p50=%u p99=%u ns\n", rounds, cycles_to_ns(samples[0]),
	      cycles_to_ns(samples[rounds / 2]), cycles_to_ns(samples[rounds * 99 / 100]));
}

static void ping_pio_command(int argc, u64 *argv) { ping(argc, argv, true); }
static void ping_mmio_command(int argc, u64 *argv) { ping(argc, argv, false); }

static void timer_command(int argc, u64 *argv)
{
	u64 ticks = argc > 1 ? argv[1] : 10, begin = clock_ns(), taken, count;
	volatile u64 *seen = &interrupt_count[VECTOR_TIMER];

	count = *seen + ticks;
	timer_periodic(5 * NSEC_PER_MS);
	while (*seen < count && clock_ns() < begin + 10000 * NSEC_PER_MS)
		asm volatile("sti; hlt");
	timer_stop();
	taken = clock_ns() - begin;
	print("%s timer ticks=%u us=%u\n",
	      *seen >= count && taken > (ticks - 1) * 5 * NSEC_PER_MS ? "ok" : "fail", ticks,
	      taken / 1000);
}

static void deadline_command(int argc, u64 *argv)
{
	u64 begin = clock_ns(), seen = interrupt_count[VECTOR_TIMER];
	u64 wanted = (argc > 1 ? argv[1] : 10) * NSEC_PER_MS;

	if (!timer_deadline(wanted)) {
		print("fail deadline absent\n");
		return;
	}
	while (interrupt_count[VECTOR_TIMER] == seen && clock_ns() < begin + 10 * wanted)
		asm volatile("pause");
	timer_stop();
	print("%s deadline us=%u\n", interrupt_count[VECTOR_TIMER] == seen + 1 ? "ok" : "fail",
	      (clock_ns() - begin) / 1000);
}

static void clock_command(int argc, u64 *argv)
{
	u64 before = clock_ns(), now;

	for (int i = 0; i < 200; i++, before = now) {
		now = clock_ns();
		if (now < before) {
			print("fail clock went back by %u\n", before - now);
			return;
		}
	}
	print("%s clock ns=%u\n", before ? "ok" : "fail", before);
}

static void sleep_command(int argc, u64 *argv)
{
	sleep_ns((argc > 1 ? argv[1] : 1) * NSEC_PER_MS);
	print("ok sleep\n");
}

// Lines at an interval: what a pause must stop and a resume must let go on.
static void ticker_command(int argc, u64 *argv)
{
	for (u64 i = 0; i < (argc > 2 ? argv[2] : 10); i++) {
		print("note tick %u\n", i);
		sleep_ns(argv[1] * NSEC_PER_MS);
	}
	print("ok ticker\n");
}

static void map_high(u64 address)
{
	static BIG u64 tables[64][512] __attribute__((aligned(4096)));
	static u32 used;
	u64 gigabyte = address >> 30;

	if (gigabyte >= 512 || pdpt[gigabyte] || used == ARRAY_SIZE(tables))
		return;
	for (u64 i = 0; i < 512; i++)
		tables[used][i] = (gigabyte << 30) + (i << 21) + 0x87;
	pdpt[gigabyte] = (u64)tables[used++] | 7;
	asm volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" ::: "rax", "memory");
}

// memory.fill ADDRESS LENGTH SEED, memory.check …: RAM anywhere, above 4 GiB too.
static void memory(const char *name, int argc, u64 *argv, bool check)
{
	u64 bad;

	if (argc < 4) {
		print("fail %s needs address, length and seed\n", name);
		return;
	}
	for (u64 at = argv[1]; at < argv[1] + argv[2]; at += 1 << 30)
		map_high(at);
	map_high(argv[1] + argv[2] - 1);
	bad = run_user(check ? (void *)user_check : (void *)user_fill, argv[1], argv[2] / 8,
		       argv[1] / 8, argv[3]);
	if (check && bad != ~0ull)
		print("fail %s at 0x%x\n", name, argv[1] + bad * 8);
	else
		print("ok %s\n", name);
}

static void fill_command(int argc, u64 *argv) { memory("memory.fill", argc, argv, false); }
static void check_command(int argc, u64 *argv) { memory("memory.check", argc, argv, true); }

static void read32_command(int argc, u64 *argv)
{
	print("ok read32 0x%x\n", (u64)read32(argv[1]));
}
static void write32_command(int argc, u64 *argv)
{
	write32(argv[1], (u32)argv[2]);
	print("ok write32\n");
}
static void read8_command(int argc, u64 *argv) { print("ok read8 0x%x\n", (u64)read8(argv[1])); }
static void write8_command(int argc, u64 *argv)
{
	write8(argv[1], (u8)argv[2]);
	print("ok write8\n");
}
static void inb_command(int argc, u64 *argv) { print("ok inb 0x%x\n", (u64)inb((u16)argv[1])); }
static void outb_command(int argc, u64 *argv)
{
	outb((u16)argv[1], (u8)argv[2]);
	print("ok outb\n");
}
static void cpuid_command(int argc, u64 *argv)
{
	u32 r[4];

	cpuid((u32)argv[1], argc > 2 ? (u32)argv[2] : 0, r);
	print("ok cpuid 0x%x 0x%x 0x%x 0x%x\n", (u64)r[0], (u64)r[1], (u64)r[2], (u64)r[3]);
}
static void rdmsr_command(int argc, u64 *argv)
{
	print("ok rdmsr 0x%x\n", rdmsr((u32)argv[1]));
}

// wait.gsi GSI MILLISECONDS: how often it came.
static void wait_gsi_command(int argc, u64 *argv)
{
	u64 deadline = clock_ns() + (argc > 2 ? argv[2] : 1000) * NSEC_PER_MS, count;
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + argv[1]];

	count = *seen;
	gsi_enable((u32)argv[1], NULL);
	print("note waiting\n");
	while (*seen == count && wait_change(seen, count, deadline))
		;
	timer_stop();
	print("%s wait.gsi count=%u\n", *seen == count ? "fail" : "ok", *seen - count);
}

static void acpi_line(int argc, u64 *argv) { acpi_command(); }
static void mptable_line(int argc, u64 *argv) { mptable_command(); }
static void mem_line(int argc, u64 *argv) { mem_command(); }
static void initrd_line(int argc, u64 *argv) { initrd_command(); }

static void cmdline_command(int argc, u64 *argv) { print("ok cmdline %s\n", command_line()); }

static void triple_command(int argc, u64 *argv)
{
	struct __attribute__((packed)) {
		u16 limit;
		u64 base;
	} nothing = { 0, 0 };

	asm volatile("cli; lidt %0; ud2" ::"m"(nothing));
}
static void port64_command(int argc, u64 *argv)
{
	outb(0x64, 0xfe);
	sleep_ns(2000 * NSEC_PER_MS);
	print("fail port64\n");
}
static void reboot_command(int argc, u64 *argv)
{
	acpi_reset();
	sleep_ns(2000 * NSEC_PER_MS); // it need not happen at once
	print("fail reboot\n");
}
static void poweroff_command(int argc, u64 *argv)
{
	acpi_power_off();
	sleep_ns(2000 * NSEC_PER_MS); // it need not happen at once
	print("fail poweroff\n");
}
static void bad_insn_command(int argc, u64 *argv)
{
	asm volatile("popcnt %%rax, %%rax" ::: "rax");
	print("ok bad-insn was executed\n");
}
static void bad_fetch_command(int argc, u64 *argv)
{
	((void (*)(void))(u64)(argc > 1 ? argv[1] : 0xe0000000))();
	print("fail bad-fetch\n");
}
static void trap_command(int argc, u64 *argv) { asm volatile("ud2"); }
static void halt_command(int argc, u64 *argv)
{
	for (;;)
		asm volatile("cli; hlt");
}
static void spin_command(int argc, u64 *argv)
{
	run_user(user_spin, argc > 1 ? argv[1] : ~0ull, 0, 0, 0);
	print("ok spin\n");
}

static const struct {
	const char *name;
	void (*function)(int argc, u64 *argv);
	int arguments; // needed
} commands[] = {
	{ "echo", echo_command, 0 },
	{ "ping.pio", ping_pio_command, 1 },
	{ "ping.mmio", ping_mmio_command, 1 },
	{ "timer", timer_command, 0 },
	{ "deadline", deadline_command, 0 },
	{ "clock", clock_command, 0 },
	{ "sleep", sleep_command, 0 },
	{ "ticker", ticker_command, 1 },
	{ "memory.fill", fill_command, 3 },
	{ "memory.check", check_command, 3 },
	{ "read32", read32_command, 1 },
	{ "write32", write32_command, 2 },
	{ "read8", read8_command, 1 },
	{ "write8", write8_command, 2 },
	{ "inb", inb_command, 1 },
	{ "outb", outb_command, 2 },
	{ "cpuid", cpuid_command, 1 },
	{ "rdmsr", rdmsr_command, 1 },
	{ "wait.gsi", wait_gsi_command, 1 },
	{ "acpi", acpi_line, 0 },
	{ "mptable", mptable_line, 0 },
	{ "mem", mem_line, 0 },
	{ "initrd", initrd_line, 0 },
	{ "cmdline", cmdline_command, 0 },
	{ "smp", smp_command, 0 },
	{ "smp.lock", smp_lock_command, 0 },
	{ "smp.ipi", smp_ipi_command, 0 },
	{ "smp.work", smp_work_command, 0 },
	{ "smp.cpuid", smp_cpuid_command, 1 },
	{ "triple", triple_command, 0 },
	{ "port64", port64_command, 0 },
	{ "reboot", reboot_command, 0 },
	{ "poweroff", poweroff_command, 0 },
	{ "bad-insn", bad_insn_command, 0 },
	{ "bad-fetch", bad_fetch_command, 0 },
	{ "trap", trap_command, 0 },
	{ "halt", halt_command, 0 },
	{ "spin", spin_command, 0 },
};

static void execute(int argc, char **words)
{
	u64 argv[MAX_WORDS];

	for (int i = 0; i < argc; i++)
		argv[i] = parse_number(words[i], NULL);
	if (save_context(&command_context))
		return; // a trap, already reported
	if (starts_with(words[0], "blk.")) {
		if (!blk_command(argc, words, argv))
			print("fail %s unknown\n", words[0]);
		return;
	}
	if (rng_command(argc, words, argv) || console_command(argc, words, argv) ||
	    balloon_command(argc, words, argv) || net_command(argc, words, argv))
		return;
	for (u32 i = 0; i < ARRAY_SIZE(commands); i++) {
		if (compare(commands[i].name, words[0]))
			continue;
		if (argc <= commands[i].arguments)
			print("fail %s needs more arguments\n", words[0]);
		else
			commands[i].function(argc, argv);
		return;
	}
	print("fail %s unknown\n", words[0]);
}

// Runs one command; its words are separated by blanks or commas.
static void run_line(char *text)
{
	char *words[MAX_WORDS];
	int count = 0;

	while (*text && count < MAX_WORDS) {
		while (*text == ' ' || *text == ',')
			*text++ = 0;
		if (!*text)
			break;
		words[count++] = text;
		while (*text && *text != ' ' && *text != ',')
			text++;
	}
	*text = 0;
	if (count)
		execute(count, words);
}

static void run_script(void)
{
	const char *text = command_line();

	while (text && *text && !starts_with(text, "script="))
		text++;
	if (!text || !*text)
		return;
	text += 7;
	while (*text && *text != ' ') {
		u32 length = 0;

		while (*text && *text != ' ' && *text != ';' && length < sizeof(line) - 1)
			line[length++] = *text++;
		line[length] = 0;
		run_line(line);
		if (*text == ';')
			text++;
	}
}

void kernel_main(void)
{
	u32 length = 0;

	serial_init();
	interrupts_init();
	clock_init();
	blk_probe();
	net_probe();
	serial_enable_input();
	run_script();
	print("ready\n");
	for (;;) {
		int byte;

		asm volatile("cli");
		byte = serial_get();
		if (byte < 0) {
			asm volatile("sti; hlt");
			continue;
		}
		asm volatile("sti");
		if (byte != '\n' && byte != '\r') {
			if (length < sizeof(line) - 1)
				line[length++] = (char)byte;
			continue;
		}
		line[length] = 0;
		length = 0;
		run_line(line);
	}
}

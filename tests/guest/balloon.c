// virtio-balloon (virtio 1.2, 5.5) as Linux drives it: one chain at a time in each queue, which are
// numbered without a gap.
#include "small.h"

#define PFNS 256
#define PAGE 4096

#define F_MUST_TELL_HOST 1
#define F_STATISTICS 2
#define F_DEFLATE_ON_OOM 4
#define F_REPORTING 32
#define F_BALLOON (F_MUST_TELL_HOST | F_STATISTICS | F_DEFLATE_ON_OOM | F_REPORTING | F_EVENT_INDEX)

enum kind { INFLATE, DEFLATE, STATISTICS, REPORTING, KINDS };

struct __attribute__((packed)) statistic {
	u16 tag;
	u64 value;
};

static struct virtio device;
static BIG struct small_ring rings[KINDS];
static BIG u32 pfns[PFNS] __attribute__((aligned(64)));
static struct statistic statistics[3];
static u64 asked;
static u64 actual; // pages in the balloon, as the device is told

static u32 get(u32 reg) { return virtio_get(&device, reg); }
static void put(u32 reg, u32 value) { virtio_put(&device, reg, value); }

static void offer_statistics(void)
{
	statistics[0] = (struct statistic){ 4, 1000 + asked }; // free memory
	statistics[1] = (struct statistic){ 5, 123456789 };    // total memory
	statistics[2] = (struct statistic){ 200, 1 };          // nobody knows it
	small_offer(&device, &rings[STATISTICS], 0, statistics, sizeof(statistics), false);
}

static void interrupted(void)
{
	u32 length;

	if (device.ready && device.features & F_STATISTICS &&
	    small_used(&rings[STATISTICS], &length) >= 0) {
		asked++;
		offer_statistics();
	}
}

static bool init(u64 mask)
{
	u32 number = 0;

	if (!small_begin(&device, 5, F_BALLOON & mask))
		return false;
	for (u32 kind = INFLATE; kind < KINDS; kind++) {
		if ((kind == STATISTICS && !(device.features & F_STATISTICS)) ||
		    (kind == REPORTING && !(device.features & F_REPORTING)))
			continue;
		if (!small_ring_init(&device, &rings[kind], number++))
			return false;
	}
	actual = 0;
	device.interrupted = interrupted;
	if (!virtio_go(&device))
		return false;
	if (device.features & F_STATISTICS)
		offer_statistics();
	return true;
}

static bool send(enum kind kind, u64 address, u32 length, bool writable)
{
	small_offer(&device, &rings[kind], 0, (void *)address, length, writable);
	return small_wait(&device, &rings[kind], &length) == 0;
}

// Pages into the balloon, or out of it, and the device is told how many there are.
static bool move(enum kind kind, u64 address, u64 count)
{
	while (count) {
		u32 some = count < PFNS ? (u32)count : PFNS;

		for (u32 i = 0; i < some; i++)
			pfns[i] = (u32)(address / PAGE) + i;
		if (!send(kind, (u64)pfns, some * 4, false))
			return false;
		address += (u64)some * PAGE;
		count -= some;
		actual += kind == INFLATE ? some : -(u64)some;
		put(REG_CONFIG + 4, (u32)actual);
	}
	return true;
}

static u64 wanted(u64 most)
{
	u64 pages = get(REG_CONFIG);

	return pages < most ? pages : most;
}

// Wait until the device wants a balloon of another size, and make it that of these pages.
static bool follow(u64 address, u64 most, u64 milliseconds)
{
	u64 deadline = clock_ns() + milliseconds * NSEC_PER_MS, goal;
	volatile u64 *seen = &interrupt_count[VECTOR_GSI + device.gsi];

	for (;;) {
		u64 old = *seen;

		if (wanted(most) != actual)
			break;
		if (!wait_change(seen, old, deadline))
			return false;
	}
	while ((goal = wanted(most)) != actual) {
		u64 some = goal > actual ? goal - actual : actual - goal;
		bool right;

		if (some > PFNS)
			some = PFNS;
		right = goal > actual ? move(INFLATE, address + actual * PAGE, some) :
					move(DEFLATE, address + (actual - some) * PAGE, some);
		if (!right)
			return false;
	}
	return true;
}

// Make a chain available as it is.
static void announce(struct small_ring *ring, u16 head)
{
	ring->avail.ring[ring->published++ % SMALL_SIZE] = head;
	ring->avail.ring[SMALL_SIZE] = ring->last_used;
	barrier();
	*(volatile u16 *)&ring->avail.index = ring->published;
	barrier();
	put(REG_NOTIFY, ring->number);
}

// A chain of 15 times the same 64 MiB of numbers.
static bool send_giant(void)
{
	struct small_ring *ring = &rings[INFLATE];
	u32 length;

	for (u16 i = 1; i < SMALL_SIZE; i++)
		ring->desc[i] = (struct desc){ 32 << 20, 64 << 20, i < SMALL_SIZE - 1 ? D_NEXT : 0,
					       (u16)(i + 1) };
	announce(ring, 1);
	return small_wait(&device, ring, &length) == 1;
}

// A chain that never ends: the device must say that it can't go on.
static bool send_loop(void)
{
	struct small_ring *ring = &rings[INFLATE];

	ring->desc[1] = (struct desc){ (u64)pfns, 4, D_NEXT, 1 };
	announce(ring, 1);
	for (u64 end = clock_ns() + TIMEOUT; clock_ns() < end;)
		if (get(REG_STATUS) & STATUS_NEEDS_RESET)
			return true;
	return false;
}

// What no right driver sends; the device has to go on.
static bool hostile(const char *kind)
{
	u32 first = !compare(kind, "far") ? 0xffffffff - PFNS : 0xc0000; // the gap below 4 GiB

	for (u32 i = 0; i < PFNS; i++)
		pfns[i] = !compare(kind, "far") || !compare(kind, "outside") ? first + i : 0x4000;
	if (!compare(kind, "giant"))
		return send_giant();
	if (!compare(kind, "loop"))
		return send_loop();
	return send(INFLATE, (u64)pfns, !compare(kind, "odd") ? 7 : sizeof(pfns),
		    !compare(kind, "writable"));
}

static void answer(const char *name, bool right)
{
	print("%s balloon.%s actual=%u\n", right ? "ok" : "fail", name, actual);
}

static void begin_command(u64 mask)
{
	bool right = init(mask);

	print("%s balloon.init features=0x%x base=0x%x\n", right ? "ok" : "fail",
	      device.features & F_BALLOON, device.base);
}

static void info(void)
{
	print("ok balloon.info wanted=%u actual=%u changes=%u asked=%u status=0x%x\n",
	      (u64)get(REG_CONFIG), (u64)get(REG_CONFIG + 4), device.config_changes, asked,
	      (u64)get(REG_STATUS));
}

static void reset(void)
{
	device.ready = false;
	put(REG_STATUS, 0);
	actual = 0;
	answer("reset", !get(REG_STATUS));
}

bool balloon_command(int argc, char **words, u64 *argv)
{
	const char *name = words[0] + 8;

	if (!starts_with(words[0], "balloon."))
		return false;
	if (!compare(name, "init"))
		begin_command(argc > 1 ? argv[1] : ~0ull);
	else if (!device.ready)
		return false;
	else if (!compare(name, "info"))
		info();
	else if (!compare(name, "reset"))
		reset();
	else if (!compare(name, "inflate") && argc > 2)
		answer(name, move(INFLATE, argv[1], argv[2]));
	else if (!compare(name, "deflate") && argc > 2)
		answer(name, move(DEFLATE, argv[1], argv[2]));
	else if (!compare(name, "report") && argc > 2)
		answer(name, send(REPORTING, argv[1], (u32)argv[2], true));
	else if (!compare(name, "follow") && argc > 3)
		answer(name, follow(argv[1], argv[2], argv[3]));
	else if (!compare(name, "is-zero") && argc > 2)
		answer(name, run_user(user_is_zero, argv[1], argv[2] * PAGE / 8, 0, 0) == ~0ull);
	else if (!compare(name, "hostile") && argc > 1)
		answer(name, hostile(words[1]));
	else
		return false;
	return true;
}

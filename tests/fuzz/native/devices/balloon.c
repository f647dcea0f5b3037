// virtio-balloon: page frame numbers, ranges and statistics of any kind, and a host that doesn't
// take the pages. What goes back to the host is guest memory, in whole pages, and was named.
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

#include <linux/virtio_balloon.h>

#include "balloon/internal.h"
#include "world.h"

#define HUGE_AT 0x40000
#define HUGE_SIZE 0x2000
#define PFNS 0x1000 // beyond all regions
#define MAX_NAMED 4096 // bytes of a chain that are looked at

// Of `more`.
enum { F_STATISTICS = 1, F_REPORTING = 2, F_MUST_TELL = 4 };

// Pages beside each other, a region that ends in the middle of a page, one that begins there, and
// one of huge pages (of 8 KiB).
static const struct guest_region regions[] = {
	{0, 0x3000}, {0x3000, 0x1000}, {0x10000, 0x1200}, {0x20800, 0x2000},
	{HUGE_AT, 0x6000}};
static bool named[PFNS], named_all;
static uint64_t removed, failed, removals;

_Static_assert(sizeof(struct sv_balloon_counters) <= COUNTER_BYTES, "room");

static unsigned int queues(void)
{
	return SV_BALLOON_QUEUES;
}

static struct sv_ring_device *create(void *counters, int *error)
{
	return sv_balloon_create(world.flags & F_KEEP, 128, counters, error);
}

static uint64_t features(void)
{
	return (world.more & F_STATISTICS ? 1ull << VIRTIO_BALLOON_F_STATS_VQ : 0) |
	       (world.more & F_REPORTING ? 1ull << VIRTIO_BALLOON_F_REPORTING : 0) |
	       (world.more & F_MUST_TELL ? 1ull << VIRTIO_BALLOON_F_MUST_TELL_HOST : 0);
}

static bool reports(unsigned int index)
{
	uint64_t features = world.device->features;

	return features & 1ull << VIRTIO_BALLOON_F_REPORTING &&
	       (index == 4 || index == (features & 1ull << VIRTIO_BALLOON_F_STATS_VQ ? 3 : 2));
}

static int shape(unsigned int index)
{
	return reports(index) ? GUEST_WRITE_ALL : GUEST_WRITE_NONE;
}

// A chain of page frame numbers, of a range, or of statistics.
static void driver(uint8_t kind)
{
	static const uint32_t first[] = {0, 2, 3, 0x10, 0x11, 0x20, 0x40, 0x42, 0x45, 0xFFFFF,
					 0xFFFFFFFF, 1 << 28};
	struct guest_buffer buffer = {GUEST_BUFFERS, 4u * (1 + kind % 16)};
	uint32_t pfn = first[next_byte() % 12];
	uint8_t step = next_byte();
	unsigned int index = kind / 16 % world.count;
	uint8_t *at = guest_at(GUEST_BUFFERS, 0x100);

	if (reports(index)) {
		buffer.addr = (uint64_t)pfn << 12;
		buffer.len = (uint32_t)(1 + kind % 8) * (step & 1 ? 0x1000 : 0x900);
		guest_add(&world.rings[index], &buffer, 1, 0, false);
		return;
	}
	for (unsigned int i = 0; i < buffer.len; i += 4, pfn += step < 0xF0 ? step % 3 : step)
		memcpy(at + i, &pfn, sizeof(pfn));
	if (step >= 0xC0)
		buffer.len += step & 3; // no whole number of them
	guest_add(&world.rings[index], &buffer, 1, 1, false);
}

static void control(uint8_t kind)
{
	struct sv_balloon_news news;

	if (kind & 1) {
		int ret = sv_balloon_ask(world.device);

		CHECK(ret == 0 || ret == -ENOTCONN);
		return;
	}
	sv_balloon_take(world.device, &news);
	CHECK(news.present < 1u << SV_BALLOON_TAGS && news.error >= 0);
	CHECK(news.told || !news.present);
}

// The pages that a chain of queue 0 names, wherever its numbers may begin.
static void name_pages(const struct iovec *iov, unsigned int count)
{
	uint8_t bytes[MAX_NAMED];
	size_t len = 0;

	for (unsigned int i = 0; i < count; i++) {
		if (iov[i].iov_len > sizeof(bytes) - len) {
			named_all = true;
			return;
		}
		memcpy(bytes + len, iov[i].iov_base, iov[i].iov_len);
		len += iov[i].iov_len;
	}
	for (size_t at = 0; at + 4 <= len; at += 4) {
		uint32_t pfn;

		memcpy(&pfn, bytes + at, sizeof(pfn));
		if (pfn < PFNS)
			named[pfn] = true;
	}
}

static void popped(unsigned int index, struct sv_chain *chain)
{
	if (index == 0)
		name_pages(chain->iov, chain->out_count);
}

// What it has taken may have changed since.
static void epoch(void)
{
	for (unsigned int i = 0; i < ledgers[0].taken; i++) {
		const struct ledger_chain *chain = &ledgers[0].chains[ledgers[0].order[i]];

		name_pages(chain->iov, chain->out_count);
	}
}

static bool is_reported(const uint8_t *at, uint64_t size)
{
	for (unsigned int index = 2; index < world.count; index++) {
		for (unsigned int i = 0; i < ledgers[index].taken; i++) {
			const struct ledger_chain *chain =
				&ledgers[index].chains[ledgers[index].order[i]];

			for (unsigned int j = 0; j < chain->in_count; j++) {
				const struct iovec *iov = &chain->iov[chain->out_count + j];
				uint64_t offset = (uint64_t)(at - (uint8_t *)iov->iov_base);

				if (reports(index) && offset < iov->iov_len &&
				    size <= iov->iov_len - offset)
					return true;
			}
		}
	}
	return false;
}

static int give(void *at, size_t size, int advice)
{
	static const int errors[] = {EOPNOTSUPP, EINVAL, ENOMEM, EBUSY};
	const struct sv_memory *memory = &world.device->memory;
	int error = world.flags & F_FAIL ? fuzz_failure(errors, 4) : 0;

	CHECK(world.runs && advice == MADV_REMOVE && !(world.flags & F_KEEP));
	CHECK(size && !(size & (GUEST_PAGE - 1)) && !((uintptr_t)at & (GUEST_PAGE - 1)));
	CHECK(guest_owns(at, size));
	removals++;
	for (unsigned int i = 0; i < memory->count; i++) {
		const struct sv_region *region = &memory->regions[i];
		uint64_t offset = (uint64_t)((uint8_t *)at - region->host);

		if (offset >= region->size)
			continue;
		CHECK(!(offset & (region->page_size - 1)) && !(size & (region->page_size - 1)));
		for (uint64_t page = 0; page < size; page += GUEST_PAGE)
			CHECK(named_all || named[(region->guest_addr + offset + page) / GUEST_PAGE] ||
			      is_reported(at, size));
	}
	if (error) {
		failed += size;
		errno = error;
		return -1;
	}
	removed += size;
	guest_allow(at, size);
	memset(at, 0, size);
	return 0;
}

static void check(void)
{
	uint64_t sums[3] = {0, 0, 0};

	for (unsigned int i = 0; i < world.count; i++) {
		const struct sv_balloon_counters *counters =
			(void *)(world.counters + i * sizeof(*counters));

		CHECK(counters->ring.chains == ledgers[i].all_pushes);
		sums[0] += counters->removed_bytes;
		sums[1] += counters->failed_bytes;
		sums[2] += counters->removals;
	}
	CHECK(sums[0] == removed && sums[1] == failed && sums[2] == removals);
}

static void pushing(unsigned int index, uint16_t head, uint32_t written)
{
	CHECK(!written);
}

static void made(void)
{
	struct sv_memory *memory = &world.device->memory;

	for (unsigned int i = 0; i < memory->count; i++) {
		struct sv_region *region = &memory->regions[i];

		region->page_size = region->guest_addr == HUGE_AT ? HUGE_SIZE : GUEST_PAGE;
		region->mapping = region->host;
		region->mapping_size = region->size;
	}
}

static void begin(void)
{
	memset(named, 0, sizeof(named));
	named_all = false;
	removed = failed = removals = 0;
	fuzz_system.madvise = give;
}

static void end(void)
{
}

const struct fuzz_kind fuzz_kind = {
	.regions = regions,
	.region_count = sizeof(regions) / sizeof(*regions),
	.longest = 4,
	.queues = queues,
	.create = create,
	.features = features,
	.shape = shape,
	.act = driver,
	.control = control,
	.popped = popped,
	.pushing = pushing,
	.epoch = epoch,
	.check = check,
	.made = made,
	.begin = begin,
	.end = end,
};

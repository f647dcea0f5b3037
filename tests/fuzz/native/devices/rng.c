// virtio-rng: a source that gives little, nothing, or errors.
#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "rng/rng.h"
#include "world.h"

static const struct guest_region regions[] = {{0, 0x2000}, {0x2000, 0x1000}, {0x10000, 0x200}};
static int source;
static uint64_t given, pushed; // bytes

_Static_assert(sizeof(struct sv_rng_counters) <= COUNTER_BYTES, "room");

static unsigned int queues(void)
{
	return 1;
}

static struct sv_ring_device *create(void *counters, int *error)
{
	uint64_t max = world.more & 1 ? 1 + next_short() : 0;

	return sv_rng_create(source, max, 1 + (world.more & 2) * 100u, 128, counters, error);
}

static uint64_t features(void)
{
	return 0;
}

static int shape(unsigned int index)
{
	return GUEST_WRITE_ALL;
}

static void flip_source(uint8_t kind)
{
	eventfd_t value;

	if (kind & 1)
		eventfd_write(source, 1);
	else
		eventfd_read(source, &value);
}

static void control(uint8_t kind)
{
	CHECK(sv_ring_set_call(world.device, 1, -1) == -EINVAL);
	CHECK(sv_ring_broken(world.device, 1) == NULL);
}

static ssize_t fill(int fd, const struct iovec *iov, int count)
{
	static const int errors[] = {EAGAIN, EINTR, EIO, ENODEV};
	uint8_t kind = next_byte();
	size_t room = 0, left;

	CHECK(fd == source && count > 0 && count <= SV_CHAIN_MAX);
	for (int i = 0; i < count; i++)
		room += iov[i].iov_len;
	CHECK(room <= SV_RNG_MAX_BYTES);
	if (kind >= 0xE0) {
		errno = errors[kind % 4];
		return kind >= 0xF8 ? 0 : -1;
	}
	left = kind & 0x40 ? room : room < 1u + kind % 64 ? room : 1u + kind % 64;
	given += left;
	room = left;
	for (int i = 0; i < count && left; i++) {
		size_t piece = iov[i].iov_len < left ? iov[i].iov_len : left;

		memset(iov[i].iov_base, kind, piece);
		left -= piece;
	}
	return (ssize_t)room;
}

static void pushing(unsigned int index, uint16_t head, uint32_t written)
{
	CHECK(written);
	pushed += written;
}

static void check(void)
{
	const struct sv_rng_counters *counters = (void *)world.counters;

	CHECK(given == pushed && counters->bytes == given);
	CHECK(counters->ring.chains == ledgers[0].all_pushes);
}

static void begin(void)
{
	if (!source)
		source = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	given = pushed = 0;
	fuzz_system.readv = fill;
}

static void end(void)
{
}

const struct fuzz_kind fuzz_kind = {
	.regions = regions,
	.region_count = sizeof(regions) / sizeof(*regions),
	.longest = 2 * 64 + 2,
	.queues = queues,
	.create = create,
	.features = features,
	.shape = shape,
	.act = flip_source,
	.control = control,
	.pushing = pushing,
	.check = check,
	.begin = begin,
	.end = end,
};

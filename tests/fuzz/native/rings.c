// Coverage-guided fuzzing of the virtqueue walk, the in-flight record and the block requests
// (native/virtq, native/blk): the input is guest memory, what changes in it while it is served,
// and what the host answers. Built by tests/fuzz/native/build.py.
//
// Guest memory lies in heap blocks of exactly its size, so that the sanitizer sees every byte
// beside it. Operations that the data plane would give to io_uring wait in a list here.
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "blk/blk.h"
#include "include/clock.h"

#define RING 16
#define DESC 0x0
#define AVAIL 0x100
#define USED 0x200
#define IMAGE_BYTES 40000 // no multiple of a sector
#define LARGE_BYTES 3000000 // more than the data plane writes zeroes at once
#define MAX_STEPS 20000

enum {
	F_EVENT_IDX = 1, F_INDIRECT = 2, F_READONLY = 4, F_DIRECT = 8,
	F_LARGE_BLOCKS = 16, F_UNMAP = 32, F_DETECT = 64, F_WRITE_THROUGH = 128,
};
enum { F_INFLIGHT = 1, F_THROTTLE = 2, F_BLOCK_DEVICE = 4, F_NO_ZERO_RANGE = 8, F_SHRINK = 16,
       F_LARGE = 32 };

static const struct {
	uint64_t at, size;
} layout[] = {{0, 0x2000}, {0x2000, 0x1000}, {0x10000, 0x200}};

// ---- the input, read from its end -----------------------------------------------------------

static const uint8_t *tape;
static size_t tape_left;

static uint8_t next_byte(void)
{
	return tape_left ? tape[--tape_left] : 0;
}

// ---- an engine without a kernel --------------------------------------------------------------

static struct sv_io *waiting;
static unsigned int submitted, reaped;

void sv_engine_submit(struct sv_engine *engine, struct sv_io *io)
{
	io->engine = engine;
	io->next = waiting;
	waiting = io;
	submitted++;
}

void sv_engine_flush(struct sv_engine *engine)
{
}

static int answer(struct sv_io *io, int fd)
{
	switch (next_byte()) {
	case 0xF0:
		return -EIO;
	case 0xF1:
		return -EAGAIN;
	case 0xF2:
		return -EOPNOTSUPP;
	case 0xF3:
		return -ENOSPC;
	case 0xF4:
		return 0;
	case 0xF5: { // less than was asked for
		struct iovec first;
		struct sv_io some = *io;

		if (io->op != SV_IO_READ && io->op != SV_IO_WRITE)
			return -EINTR;
		first = io->iov[0];
		first.iov_len = (first.iov_len + 1) / 2;
		some.iov = &first;
		some.count = 1;
		return sv_io_run(&some, fd);
	}
	default:
		return sv_io_run(io, fd);
	}
}

static int image_fd = -1;

struct sv_io *sv_engine_reap(struct sv_engine *engine)
{
	struct sv_io **at = &waiting;
	struct sv_io *io;

	// In any order.
	for (unsigned int skip = next_byte() % 4; skip && *at && (*at)->next; skip--)
		at = &(*at)->next;
	io = *at;
	if (!io)
		return NULL;
	*at = io->next;
	io->result = answer(io, image_fd);
	reaped++;
	return io;
}

// ---- one run ---------------------------------------------------------------------------------

struct world {
	struct sv_memory memory;
	struct sv_disk disk;
	struct sv_virtq vq;
	struct sv_engine engine;
	struct sv_blk_counters counters;
	struct sv_blk_queue queue;
	struct sv_inflight_queue *inflight;
};

static void check(bool holds)
{
	if (!holds)
		abort();
}

static void make_memory(struct world *world, const uint8_t *data, size_t size)
{
	for (unsigned int i = 0; i < sizeof(layout) / sizeof(*layout); i++) {
		uint8_t *host = aligned_alloc(16, layout[i].size);
		size_t part = size < layout[i].size ? size : layout[i].size;

		memset(host, 0, layout[i].size);
		memcpy(host, data, part);
		data += part;
		size -= part;
		world->memory.regions[i] = (struct sv_region){
			.guest_addr = layout[i].at, .size = layout[i].size, .host = host};
		world->memory.count++;
	}
}

static void make_disk(struct sv_disk *disk, uint8_t flags, uint8_t more)
{
	static const struct sv_limits limits = {.rate = {1000000}, .burst = {3}};
	uint64_t size = more & F_LARGE ? LARGE_BYTES : IMAGE_BYTES;
	bool direct = flags & F_DIRECT;

	check(ftruncate(image_fd, (off_t)size) == 0);
	*disk = (struct sv_disk){
		.fd = image_fd,
		.readonly = flags & F_READONLY,
		.direct = direct,
		.block_device = more & F_BLOCK_DEVICE,
		.unmap = flags & F_UNMAP,
		.detect_zeroes = flags & F_DETECT,
		.detect_unmap = flags & F_UNMAP,
		.writeback = !(flags & F_WRITE_THROUGH),
		.no_zero_range = more & F_NO_ZERO_RANGE,
		.size = size,
		.capacity = (size + 511) / 512,
		.align = !direct ? 1 : flags & F_LARGE_BLOCKS ? 4096 : 512,
		.memory_align = direct ? 512 : 1,
		.end = UINT64_MAX,
		.failures.event_fd = -1,
	};
	pthread_rwlock_init(&disk->partial, NULL);
	sv_throttle_init(&disk->throttle);
	if (more & F_THROTTLE)
		check(sv_throttle_set(&disk->throttle, &limits, sv_now_ns()) == 0);
	if (more & F_SHRINK)
		check(ftruncate(image_fd, 1000) == 0);
}

// What a driver may do at any moment: change any two bytes of its memory.
static void scribble(struct world *world)
{
	for (unsigned int count = next_byte() % 8; count; count--) {
		uint64_t at = next_byte() | next_byte() << 8;
		uint64_t piece;
		uint8_t *host = sv_memory_guest(&world->memory, at, 2, &piece);
		uint8_t low = next_byte(), high = next_byte();

		if (host && piece == 2) {
			host[0] = low;
			host[1] = high;
		}
	}
}

static bool step(struct world *world, bool take)
{
	bool progress = sv_blk_release(&world->queue);

	if (take && !world->vq.broken)
		progress |= sv_blk_serve(&world->queue, 1 + next_byte() % 8);
	progress |= sv_blk_reap(&world->queue);
	world->queue.inline_bytes = 0;
	sv_blk_note_latencies(&world->queue);
	sv_virtq_publish(&world->vq);
	sv_virtq_wants_call(&world->vq);
	return progress;
}

static void serve(struct world *world)
{
	uint16_t first = world->vq.used_idx;
	unsigned int steps = 0;

	for (unsigned int rounds = 1 + next_byte() % 6; rounds; rounds--) {
		step(world, true);
		scribble(world);
		if (!sv_virtq_enable_kicks(&world->vq))
			sv_virtq_disable_kicks(&world->vq);
	}
	// A stop: what was taken is finished, and once.
	world->queue.draining = true;
	while (world->queue.busy || world->queue.held || waiting) {
		step(world, false);
		check(++steps < MAX_STEPS);
	}
	check(!world->queue.writes && !world->queue.deferred);
	check(submitted == reaped);
	check(world->vq.used_published == world->vq.used_idx);
	for (unsigned int i = 0; i < RING / 64 + 1; i++)
		check(!world->vq.busy[i]);
	check((uint16_t)(world->vq.used_idx - first) ==
	      (uint16_t)(world->counters.reads + world->counters.writes +
			 world->counters.flushes + world->counters.discards +
			 world->counters.write_zeroes + world->counters.others +
			 (world->vq.broken && !strcmp(world->vq.reason,
						      "a request without a status byte"))));
}

static void run(struct world *world, uint8_t flags, uint8_t more)
{
	uint64_t features = (flags & F_EVENT_IDX ? 1ull << 29 : 0) |
			    (flags & F_INDIRECT ? 1ull << 28 : 0) | 1ull << 32;

	if (sv_virtq_start(&world->vq, &world->memory, RING, DESC, AVAIL, USED, features,
			   next_byte(), world->inflight) < 0)
		return;
	check(sv_blk_init(&world->queue, &world->disk, &world->vq, &world->engine,
			  &world->counters, RING) == 0);
	serve(world);
	sv_virtq_stop(&world->vq);
	sv_blk_deinit(&world->queue);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct world *world;
	uint8_t flags, more;
	size_t record = sv_inflight_size(RING);

	if (size < 4)
		return -1;
	if (image_fd < 0)
		image_fd = memfd_create("image", 0);
	world = calloc(1, sizeof(*world));
	flags = data[0];
	more = data[1];
	// Guest memory from the start, everything else from the end.
	tape = data + 2;
	tape_left = size - 2;
	waiting = NULL;
	submitted = reaped = 0;
	make_memory(world, data + 2, size - 2);
	make_disk(&world->disk, flags, more);
	if (more & F_INFLIGHT) {
		world->inflight = aligned_alloc(64, record);
		for (size_t i = 0; i < record; i++)
			((uint8_t *)world->inflight)[i] = next_byte();
		// Else hardly one in 2^32 is looked into.
		world->inflight->version %= 3;
		world->inflight->desc_num = flags & 1 ? RING : world->inflight->desc_num;
	}
	run(world, flags, more);
	for (unsigned int i = 0; i < world->memory.count; i++)
		free(world->memory.regions[i].host);
	pthread_rwlock_destroy(&world->disk.partial);
	sv_throttle_deinit(&world->disk.throttle);
	free(world->inflight);
	free(world);
	return 0;
}

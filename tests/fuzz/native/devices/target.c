// Coverage-guided fuzzing of the devices on the engine for small devices (native/ring), one kind
// each: a hostile driver on all queues, a host that fails, control calls in any order. Built by
// tests/fuzz/native/build.py with one of rng.c, balloon.c and console.c.
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <linux/virtio_config.h>

#include "world.h"

#define QUEUE_SIZE 128 // more than a batch
#define MAX_STEPS 200

struct world world;
int kicks[MAX_QUEUES];
static int call_fd, err_fd;

void act(void)
{
	uint8_t kind = next_byte();
	unsigned int index = kind / 8 % world.count;

	switch (kind % 8) {
	case 0: guest_scribble(); break;
	case 1:
	case 2: guest_add_any(&world.rings[index], fuzz_kind.shape(index)); break;
	case 3:
		guest_add_any(&world.rings[index], fuzz_kind.shape(index));
		// fall through
	case 4: eventfd_write(kicks[index], 1); break;
	default: fuzz_kind.act(next_byte());
	}
}

static void start(unsigned int index)
{
	const struct guest_ring *ring = &world.rings[index];
	struct sv_ring_place place = {ring->size, ring->desc, ring->avail, ring->used,
				      world.bases[index], kicks[index], call_fd, err_fd};
	bool running = world.device->queues[index].running;
	int ret = sv_ring_start(world.device, index, &place);

	if (running)
		CHECK(ret == -EBUSY);
	else if (ret < 0)
		ledger_cancel(index);
	CHECK(world.has_thread == (world.device->running > 0));
}

static void stop(unsigned int index)
{
	bool running = world.device->queues[index].running;
	int base = sv_ring_stop(world.device, index);

	CHECK(world.has_thread == (world.device->running > 0));
	if (!running) {
		CHECK(base == -EINVAL);
		return;
	}
	ledger_end(index, base);
	world.bases[index] = (uint16_t)base;
}

static void stop_all(void)
{
	for (unsigned int i = 0; i < world.count; i++)
		stop(i);
	CHECK(!world.device->running && !world.has_thread);
	if (fuzz_kind.check)
		fuzz_kind.check();
}

static uint64_t features(void)
{
	return fuzz_kind.features() | 1ull << VIRTIO_F_VERSION_1 |
	       (world.flags & F_EVENT ? 1ull << VIRTIO_RING_F_EVENT_IDX : 0) |
	       (world.flags & F_INDIRECT ? 1ull << VIRTIO_RING_F_INDIRECT_DESC : 0);
}

static void make(void)
{
	struct sv_memory *memory;
	int error;

	world.device = fuzz_kind.create(world.counters, &error);
	CHECK(world.device && world.device->count == world.count);
	memory = &world.device->memory;
	for (unsigned int i = 0; i < fuzz_kind.region_count; i++)
		memory->regions[i] = (struct sv_region){
			.guest_addr = fuzz_kind.regions[i].at,
			.size = fuzz_kind.regions[i].size,
			.host = guest_at(fuzz_kind.regions[i].at, 1),
		};
	memory->count = fuzz_kind.region_count;
	if (fuzz_kind.made)
		fuzz_kind.made();
	CHECK(sv_ring_set_features(world.device, features()) == 0);
}

static void destroy(void)
{
	stop_all();
	world.device->memory.count = 0; // not its mappings
	sv_ring_destroy(world.device);
}

static void regions_at_any_time(void)
{
	int busy = world.device->running ? -EBUSY : 0;
	int fd = memfd_create("region", MFD_CLOEXEC);

	CHECK(ftruncate(fd, 0x1000) == 0);
	CHECK(sv_ring_add_region(world.device, 0x20000000, 0x1000, 0, fd) == busy);
	CHECK(sv_ring_remove_region(world.device, 0x20000000, 0x1000) == busy);
	close(fd);
}

static void control(uint8_t kind)
{
	unsigned int index = kind / 8 % world.count;
	int busy = world.device->running ? -EBUSY : 0;

	switch (kind % 8) {
	case 0: CHECK(sv_ring_set_call(world.device, index, kind & 0x80 ? call_fd : -1) == 0); break;
	case 1: sv_ring_broken(world.device, index); break;
	case 2: regions_at_any_time(); break;
	case 3:
		CHECK(sv_ring_reset(world.device) == busy);
		CHECK(sv_ring_set_features(world.device, busy ? 0 : features()) == busy);
		break;
	case 4:
		world.more = next_byte();
		CHECK(sv_ring_set_features(world.device, features()) == busy);
		break;
	default: fuzz_kind.control(kind / 8);
	}
}

static void step(uint8_t kind)
{
	unsigned int index = kind / 16 % world.count;

	switch (kind % 16) {
	case 0:
		stop(index);
		if (kind & 0x80)
			world.rings[index] = guest_ring_place();
		start(index);
		break;
	case 1: stop(index); break;
	case 2:
		stop(index);
		world.bases[index] = next_byte() - 8;
		start(index);
		break;
	case 3: control(next_byte()); break;
	case 4: fuzz_system.now += (uint64_t)next_short() << 16; break;
	case 5: // another worker goes on
		if (kind & 0xF0)
			break;
		destroy();
		make();
		for (unsigned int i = 0; i < world.count; i++)
			start(i);
		break;
	case 6:
		for (unsigned int i = 0; i < world.count; i++)
			stop(i);
		break;
	case 7: start(index); break;
	case 8:
	case 9: fuzz_kind.act(next_byte()); break;
	case 10:
	case 11:
	case 12: act(); break;
	default: slice();
	}
}

static unsigned int find_index(const struct sv_virtq *vq)
{
	const struct sv_ring_queue *queue =
		(const void *)((const uint8_t *)vq - offsetof(struct sv_ring_queue, vq));

	return (unsigned int)(queue - world.device->queues);
}

static void open_once(void)
{
	if (call_fd)
		return;
	call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	err_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	for (unsigned int i = 0; i < MAX_QUEUES; i++)
		kicks[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
}

static void run(void)
{
	make();
	for (unsigned int i = 0; i < world.count; i++) {
		eventfd_t value;

		eventfd_read(kicks[i], &value);
		world.rings[i] = guest_ring_first(i);
		start(i);
	}
	for (unsigned int i = 0; i < MAX_STEPS; i++) {
		uint8_t kind = next_byte();

		if (!kind)
			break;
		step(kind);
	}
	slice();
	destroy();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct sv_memory memory = {0};

	if (size < 8)
		return -1;
	open_once();
	world = (struct world){.flags = data[0], .more = data[1]};
	// Guest memory from the start, everything else from the end.
	fuzz_tape = data + 2;
	fuzz_tape_left = size - 2;
	world.count = fuzz_kind.queues();
	guest_make(&memory, fuzz_kind.regions, fuzz_kind.region_count, data + 2, size - 2);
	ledger_index = find_index;
	ledger_popped = fuzz_kind.popped;
	ledger_pushing = fuzz_kind.pushing;
	use_system();
	fuzz_kind.begin();
	run();
	fuzz_kind.end();
	ledger_forget();
	guest_free();
	return 0;
}

// Coverage-guided fuzzing of the net worker's data plane (native/net): a hostile driver on all its
// queues, frames that come meanwhile, a tap that fails, a hostile predecessor's settings, control
// calls in any order. Built by tests/fuzz/native/build.py.
//
// Normally a queue's thread runs when the input says and as long as it says, by a call (one
// thread, so a run can be repeated, and what changes in guest memory is known). In the target
// net-threads they are real, and guest memory changes while they read it.
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <linux/virtio_net.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "world.h"

#define QUEUE_SIZE 128 // more than a batch
#define MAX_STEPS 200

static const struct guest_region regions[] = {{0, 0x2000}, {0x2000, 0x1000}, {0x10000, 0x200}};
static const uint8_t mac[SV_NET_MAC_BYTES] = {0x52, 0x54, 0, 0xAA, 0xBB, 0xCC};

struct world world;
int taps[MAX_PAIRS], peers[MAX_PAIRS], kicks[MAX_QUEUES];
static int call_fd, err_fd;

static uint64_t features(uint8_t more)
{
	uint64_t bits = 1ull << VIRTIO_F_VERSION_1;

	bits |= more & F_MERGE ? 1ull << VIRTIO_NET_F_MRG_RXBUF : 0;
	bits |= more & F_EVENT ? 1ull << VIRTIO_RING_F_EVENT_IDX : 0;
	bits |= more & F_INDIRECT ? 1ull << VIRTIO_RING_F_INDIRECT_DESC : 0;
	if (more & F_COMMANDS)
		bits |= 1ull << VIRTIO_NET_F_CTRL_VQ | 1ull << VIRTIO_NET_F_CTRL_RX |
			1ull << VIRTIO_NET_F_CTRL_VLAN | 1ull << VIRTIO_NET_F_CTRL_RX_EXTRA |
			1ull << VIRTIO_NET_F_GUEST_ANNOUNCE | 1ull << VIRTIO_NET_F_MQ |
			1ull << VIRTIO_NET_F_CTRL_MAC_ADDR |
			1ull << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
	if (more & F_OFFLOADS)
		bits |= 1ull << VIRTIO_NET_F_GUEST_CSUM | 1ull << VIRTIO_NET_F_GUEST_TSO4 |
			1ull << VIRTIO_NET_F_GUEST_TSO6 | 1ull << VIRTIO_NET_F_GUEST_ECN |
			1ull << VIRTIO_NET_F_GUEST_UFO;
	if (more & F_ANY)
		for (unsigned int shift = 0; shift < 32; shift += 16)
			bits ^= (uint64_t)next_short() << shift;
	return bits;
}

static void start(unsigned int index)
{
	const struct guest_ring *ring = &world.rings[index];
	struct sv_net_ring setup = {ring->size, ring->desc, ring->avail, ring->used,
				    world.bases[index], kicks[index], call_fd, err_fd};
	eventfd_t value;
	int ret;

	if (world.net->queues[index].running) {
		CHECK(sv_net_start(world.net, index, &setup) == -EBUSY);
		return;
	}
	eventfd_read(kicks[index], &value);
	ret = sv_net_start(world.net, index, &setup);
	if (ret < 0)
		ledger_cancel(index);
	else
		CHECK(world.net->queues[index].running);
}

static void stop(unsigned int index)
{
	bool running = world.net->queues[index].running;
	int base = sv_net_stop(world.net, index);

	if (!running) {
		CHECK(base == -EINVAL);
		return;
	}
	end_frame(index);
	ledger_end(index, base);
	world.bases[index] = (uint16_t)base;
}

static void slice(unsigned int index)
{
	struct sv_net_queue *queue = &world.net->queues[index];

	if (!queue->running || threads())
		return;
	world.current = queue;
	world.polls = 0;
	world.stopped = 0;
	// After so many calls of native/virtq it is asked to end.
	world.limit = ledger_calls + (next_byte() & 3 ? 400 : next_byte());
	epoch_begin();
	world.run(queue);
	guest_epoch_end();
	end_frame(index);
	queue->stop = false;
	world.stopped = 0;
	world.current = NULL;
}

static bool make(void)
{
	static const int none[MAX_PAIRS] = {-1, -1, -1};
	struct sv_rate limits[2] = {{0, 0}, {0, 0}};
	int error;

	if (world.flags & F_LIMIT)
		for (unsigned int i = 0; i < 2; i++) {
			limits[i].packets = next_byte();
			limits[i].bytes = (uint64_t)next_byte() << 10;
		}
	memset(world.told, 0, sizeof(world.told));
	world.net = sv_net_create(world.flags & F_NO_TAP ? none : taps, world.pairs,
				  world.flags & F_CONTROL, QUEUE_SIZE, mac, limits, world.counters,
				  world.state, &error);
	CHECK(world.net || (error && world.more & F_FAIL));
	if (!world.net)
		return false;
	for (unsigned int i = 0; i < sizeof(regions) / sizeof(*regions); i++)
		world.net->memory.regions[i] = (struct sv_region){
			.guest_addr = regions[i].at,
			.size = regions[i].size,
			.host = guest_at(regions[i].at, 1),
		};
	world.net->memory.count = sizeof(regions) / sizeof(*regions);
	return true;
}

static void stop_all(void)
{
	for (unsigned int i = 0; i < world.count; i++)
		stop(i);
	check_counters();
	check_tap();
}

// Another worker goes on where this one ends: with what the driver has set.
static bool succeed(void)
{
	struct sv_net_settings before;
	bool same = world.state && !world.refused && !(world.more & F_FAIL) &&
		    !(world.flags & F_HOSTILE_STATE);

	stop_all();
	before = world.net->settings;
	sv_net_destroy(world.net);
	if (!make())
		return false;
	if (same)
		CHECK(!memcmp(&before.filter, &world.net->settings.filter, sizeof(before.filter)) &&
		      before.pairs == world.net->settings.pairs &&
		      before.offloads == world.net->settings.offloads);
	sv_net_set_features(world.net, features(world.more & ~F_ANY));
	return true;
}

static void regions_while_running(void)
{
	bool running = false;
	int fd = memfd_create("region", MFD_CLOEXEC), ret;

	for (unsigned int i = 0; i < world.count; i++)
		running |= world.net->queues[i].running;
	CHECK(ftruncate(fd, 0x1000) == 0);
	ret = sv_net_add_region(world.net, 0x20000, 0x1000, 0, fd);
	CHECK(ret == (running ? -EBUSY : 0));
	ret = sv_net_remove_region(world.net, 0x20000, 0x1000);
	CHECK(ret == (running ? -EBUSY : 0));
	close(fd);
}

// A predecessor that is still there, and hostile.
static void write_state(void)
{
	uint8_t *bytes = (uint8_t *)world.state;

	for (unsigned int i = 0; i < 4; i++) {
		size_t at = next_short() % sv_net_state_size();

		bytes[at] = next_byte();
	}
	world.state->copies[0].pairs = next_byte() % 5;
	world.state->copies[1].pairs = next_byte() % 5;
	world.flags |= F_HOSTILE_STATE;
}

static void control(uint8_t kind)
{
	uint8_t address[SV_NET_MAC_BYTES];

	switch (kind >> 4 & 7) {
	case 0: sv_net_set_link(world.net, kind & 0x80); break;
	case 1: world.refused |= sv_net_reset(world.net) < 0; break;
	case 2: world.refused |= sv_net_set_features(world.net, features(next_byte())) < 0; break;
	case 3: CHECK(sv_net_set_call(world.net, next_byte() % world.count,
				      kind & 0x80 ? call_fd : -1) == 0); break;
	case 4: sv_net_mac(world.net, address); break;
	case 5: regions_while_running(); break;
	case 6:
		CHECK(sv_net_stop(world.net, world.count) == -EINVAL);
		if (world.state && kind & 0x80)
			write_state();
		break;
	default: sv_net_broken(world.net, next_byte() % world.count);
	}
}

// ---- one run ---------------------------------------------------------------------------------

static unsigned int find_index(const struct sv_virtq *vq)
{
	return index_of((const void *)((const uint8_t *)vq - offsetof(struct sv_net_queue, vq)));
}

static void open_once(void)
{
	if (call_fd)
		return;
	call_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	err_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	for (unsigned int i = 0; i < MAX_QUEUES; i++)
		kicks[i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	for (unsigned int i = 0; i < MAX_PAIRS; i++) {
		int pair[2], room = 33000;

		CHECK(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) == 0);
		// Twice that: it is full with one large frame, or with 85 small ones.
		CHECK(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room)) == 0);
		taps[i] = pair[0];
		peers[i] = pair[1];
	}
}

// A predecessor's settings: anything, or something that a worker might have left.
static void make_state(void)
{
	uint8_t *bytes;
	uint32_t value = 1;

	if (!(world.flags & (F_STATE | F_HOSTILE_STATE)))
		return;
	world.state = calloc(1, sv_net_state_size());
	if (!(world.flags & F_HOSTILE_STATE))
		return;
	bytes = (uint8_t *)world.state;
	value += next_short();
	for (size_t i = 0; i < sv_net_state_size(); i++) {
		value = value * 1103515245 + 12345;
		bytes[i] = (uint8_t)(value >> 16);
	}
	world.state->generation = next_byte();
	if (next_byte() & 1)
		return;
	for (unsigned int i = 0; i < 2; i++) {
		world.state->copies[i].filter.unicast_count = next_byte() % 70;
		world.state->copies[i].filter.multicast_count = next_byte() % 70;
		world.state->copies[i].pairs = next_byte() % 5;
		world.state->copies[i].offloads &= 0xFFFF;
	}
}

static void step(uint8_t kind)
{
	unsigned int index = kind / 16 % world.count;

	switch (kind % 16) {
	case 0: stop(index); start(index); break;
	case 1: stop(index); break;
	case 2:
		stop(index);
		world.rings[index] = guest_ring_place();
		start(index);
		break;
	case 3:
		stop(index);
		world.bases[index] = next_byte() - 8;
		start(index);
		break;
	case 4: control(next_byte()); break;
	case 5: fuzz_system.now += threads() ? 0 : (uint64_t)next_short() << 16; break;
	case 6:
		act();
		act();
		if (threads())
			sched_yield();
		break;
	case 7:
	case 8: act(); break;
	default: slice(index);
	}
}

static void run(void)
{
	for (unsigned int i = 0; i < world.count; i++) {
		world.rings[i] = guest_ring_first(i);
		start(i);
	}
	for (unsigned int i = 0; i < MAX_STEPS; i++) {
		uint8_t kind = next_byte();

		if (!kind)
			break;
		if (kind != 0xFF)
			step(kind);
		else if (!succeed())
			return;
	}
	for (unsigned int i = 0; i < world.count; i++)
		slice(i);
	stop_all();
	sv_net_destroy(world.net);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct sv_memory memory = {0};

	if (size < 8)
		return -1;
	open_once();
	for (unsigned int i = 0; i < MAX_PAIRS; i++) {
		drain(taps[i]);
		drain(peers[i]);
	}
	world = (struct world){.flags = data[0], .more = data[1]};
	world.pairs = 1 + (data[0] & 3) % MAX_PAIRS;
	world.count = 2 * world.pairs + !!(data[0] & F_CONTROL);
	for (unsigned int i = 0; i < MAX_PAIRS; i++)
		world.attached[i] = true;
	// Guest memory from the start, everything else from the end.
	fuzz_tape = data + 2;
	fuzz_tape_left = size - 2;
	guest_make(&memory, regions, sizeof(regions) / sizeof(*regions), data + 2, size - 2);
	ledger_index = find_index;
	ledger_popped = on_pop;
	ledger_pushing = on_push;
	use_system();
	make_state();
	if (make()) {
		world.refused |= sv_net_set_features(world.net, features(world.more)) < 0;
		run();
	}
	ledger_forget();
	guest_free();
	free(world.state);
	return 0;
}

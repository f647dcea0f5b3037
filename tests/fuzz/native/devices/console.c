// virtio-console: ports whose other ends come, go, send and don't read; control messages of any
// kind; a predecessor's memory, hostile or not.
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/virtio_console.h>

#include "console/internal.h"
#include "world.h"

#define MAX_PORTS 3

// Of `more`: bits 0 and 1 are the number of ports. All but F_MULTIPORT stay as they are at first.
enum { F_MULTIPORT = 4, F_NO_PORT = 8, F_NAMED = 32, F_SIZED = 64 };

static const struct guest_region regions[] = {{0, 0x2000}, {0x2000, 0x1000}, {0x10000, 0x200}};
static struct sv_console_state *state;
static int sockets[MAX_PORTS], peers[MAX_PORTS];
static unsigned int ports;
static uint8_t setup;
static uint64_t read_bytes[2 * MAX_PORTS + 2];
// How often the driver said that it has the device, and each port; how often it was told what;
// how often there was something new to tell.
static unsigned int device_ready, port_ready[MAX_PORTS], told[VIRTIO_CONSOLE_PORT_NAME + 1][MAX_PORTS];
static unsigned int makes, changes;

_Static_assert(sizeof(struct sv_console_counters) <= COUNTER_BYTES, "room");

static unsigned int queues(void)
{
	setup = world.more;
	ports = 1 + (setup & 3) % MAX_PORTS;
	return 2 * ports + 2;
}

static struct sv_ring_device *create(void *counters, int *error)
{
	struct sv_console_port table[MAX_PORTS];

	memset(table, 0, sizeof(table));
	for (unsigned int i = 0; i < ports; i++) {
		bool missing = i && setup & F_NO_PORT;

		table[i] = (struct sv_console_port){.fd = missing ? -1 : sockets[i],
						    .console = !(i & 1), .open = i & 1};
		if (setup & F_NAMED)
			memset(table[i].name, 'a' + (int)i, i ? sizeof(table[i].name) : 20);
		if (setup & F_SIZED)
			table[i].cols = table[i].rows = 80;
	}
	return sv_console_create(table, ports, 128, counters, state, error);
}

static uint64_t features(void)
{
	return (world.more & F_MULTIPORT ? 1ull << VIRTIO_CONSOLE_F_MULTIPORT : 0) |
	       1ull << VIRTIO_CONSOLE_F_SIZE;
}

static int shape(unsigned int index)
{
	return index % 2 ? GUEST_WRITE_NONE : GUEST_WRITE_ALL;
}

// A message as a driver would send it, or nearly.
static void message(void)
{
	struct guest_buffer buffer = {GUEST_BUFFERS, sizeof(struct virtio_console_control)};
	struct virtio_console_control *control = (void *)guest_at(buffer.addr, buffer.len);
	uint8_t kind = next_byte();

	control->id = kind < 0xF0 ? (kind >> 4) % (MAX_PORTS + 1) : next_short();
	control->event = kind % 10;
	control->value = kind % 10 < 8 ? !(kind & 8) : next_short();
	guest_add(&world.rings[SV_CONSOLE_CONTROL_TX], &buffer, 1, 1, false);
}

static void host(uint8_t kind)
{
	static uint8_t data[70000];
	unsigned int nr = kind / 8 % ports;
	static const uint32_t lengths[] = {1, 7, 100, 4096, sizeof(data)};

	switch (kind % 8) {
	case 0:
	case 1: message(); break;
	case 2:
	case 3: send(peers[nr], data, lengths[next_byte() % 5], MSG_DONTWAIT | MSG_NOSIGNAL); break;
	case 4: (void)!recv(peers[nr], data, lengths[next_byte() % 5], MSG_DONTWAIT); break;
	case 5:
		if (kind >= 0xE0)
			shutdown(peers[nr], next_byte() % 3);
		break;
	default:
		for (unsigned int i = 0; i < 8; i++)
			send(peers[nr], data, 64, MSG_DONTWAIT | MSG_NOSIGNAL);
	}
}

static void control(uint8_t kind)
{
	unsigned int nr = kind / 4 % (MAX_PORTS + 1);
	bool there = nr < ports && !(nr && setup & F_NO_PORT);
	int expected = there ? 0 : -ENOENT;

	changes++;
	if (kind & 1) {
		CHECK(sv_console_set_open(world.device, nr, kind & 2) == expected);
	} else {
		uint8_t cols = next_byte(), rows = next_byte();

		CHECK(sv_console_set_size(world.device, nr, cols, rows) == expected);
	}
}

static void gather(struct virtio_console_control *message, const struct iovec *iov)
{
	for (size_t done = 0; done < sizeof(*message); iov++) {
		size_t left = sizeof(*message) - done;
		size_t piece = iov->iov_len < left ? iov->iov_len : left;

		memcpy((uint8_t *)message + done, iov->iov_base, piece);
		done += piece;
	}
}

static void hear(const struct ledger_chain *chain)
{
	struct virtio_console_control message;
	uint64_t bytes = 0;

	for (unsigned int i = 0; i < chain->out_count; i++)
		bytes += chain->iov[i].iov_len;
	if (bytes < sizeof(message))
		return;
	gather(&message, chain->iov);
	device_ready += message.event == VIRTIO_CONSOLE_DEVICE_READY;
	if (message.event == VIRTIO_CONSOLE_PORT_READY && message.id < MAX_PORTS)
		port_ready[message.id]++;
}

// Told once each, whatever is asked for and however often; a successor may tell it once more.
static void check_told(const struct virtio_console_control *message)
{
	unsigned int times = ++told[message->event][message->id];

	switch (message->event) {
	case VIRTIO_CONSOLE_PORT_ADD:
		CHECK(message->value == 1 && times <= device_ready + makes);
		break;
	case VIRTIO_CONSOLE_CONSOLE_PORT:
	case VIRTIO_CONSOLE_PORT_NAME:
		CHECK(message->value == 1 && times <= port_ready[message->id] + makes);
		break;
	case VIRTIO_CONSOLE_PORT_OPEN:
		CHECK(message->value <= 1 && times <= port_ready[message->id] + makes + changes);
		break;
	default:
		CHECK(message->event == VIRTIO_CONSOLE_RESIZE);
		CHECK(times <= port_ready[message->id] + makes + changes);
	}
}

static void pushing(unsigned int index, uint16_t head, uint32_t written)
{
	const struct ledger_chain *chain = &ledgers[index].chains[head];
	struct virtio_console_control message;

	if (index == SV_CONSOLE_CONTROL_TX)
		hear(chain);
	if (index % 2) {
		CHECK(!written);
		return;
	}
	CHECK(written);
	read_bytes[index] += written;
	if (index != SV_CONSOLE_CONTROL_RX)
		return;
	CHECK(written >= sizeof(message));
	CHECK(written <= sizeof(message) + SV_CONSOLE_NAME_BYTES);
	if (chain->in_count > 1)
		return; // its buffers may lie one upon the other
	memcpy(&message, chain->iov[0].iov_base, sizeof(message));
	CHECK(message.id < ports && !(message.id && setup & F_NO_PORT));
	CHECK(message.event <= VIRTIO_CONSOLE_PORT_NAME);
	check_told(&message);
}

static void check(void)
{
	for (unsigned int i = 0; i < world.count; i++) {
		const struct sv_console_counters *counters =
			sv_console_counters_of(world.device, i);

		CHECK(counters->ring.chains == ledgers[i].all_pushes);
		if (!(i % 2) && i != SV_CONSOLE_CONTROL_RX)
			CHECK(counters->bytes == read_bytes[i]);
	}
}

static void made(void)
{
	makes++;
	// A successor serves what its predecessor did: with the same memory.
	CHECK(!state || ((struct console *)world.device->own)->state == state);
}

// A predecessor's: anything, or something that a worker might have left.
static void make_state(void)
{
	uint8_t *bytes;
	uint32_t value = 1;

	state = world.flags & (F_STATE | F_HOSTILE_STATE) ? calloc(1, sv_console_state_size()) : NULL;
	if (!(world.flags & F_HOSTILE_STATE))
		return;
	bytes = (uint8_t *)state;
	value += next_short();
	for (size_t i = 0; i < sv_console_state_size(); i++) {
		value = value * 1103515245 + 12345;
		bytes[i] = (uint8_t)(value >> 16);
	}
	state->magic = 0x53564331u;
	state->device_ready = next_byte() % 3;
	if (next_byte() & 1)
		return;
	for (unsigned int nr = 0; nr < SV_CONSOLE_MAX_PORTS; nr++) {
		struct sv_console_port_state *port = &state->ports[nr];

		port->ready &= 1;
		port->guest_open &= 1;
		port->told_port &= 1;
		port->told_console &= 1;
		port->told_name &= 1;
		port->told_open &= 1;
		port->sent_index %= 4;
		port->sent %= 64;
	}
}

static void begin(void)
{
	memset(read_bytes, 0, sizeof(read_bytes));
	memset(port_ready, 0, sizeof(port_ready));
	memset(told, 0, sizeof(told));
	device_ready = makes = changes = 0;
	make_state();
	for (unsigned int i = 0; i < ports; i++) {
		int pair[2];

		CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) == 0);
		sockets[i] = pair[0];
		peers[i] = pair[1];
	}
}

static void end(void)
{
	for (unsigned int i = 0; i < ports; i++) {
		close(sockets[i]);
		close(peers[i]);
	}
	free(state);
	state = NULL;
}

const struct fuzz_kind fuzz_kind = {
	.regions = regions,
	.region_count = sizeof(regions) / sizeof(*regions),
	.longest = 2 * SV_CONSOLE_BATCH + 2,
	.queues = queues,
	.create = create,
	.features = features,
	.shape = shape,
	.act = host,
	.control = control,
	.pushing = pushing,
	.check = check,
	.made = made,
	.begin = begin,
	.end = end,
};

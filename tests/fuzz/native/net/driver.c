#include <linux/virtio_net.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "world.h"

static void send_frame(unsigned int pair)
{
	static const uint16_t lengths[] = {0, 5, 12, 13, 24, 30, 72, 76, 1526, 1526, 4000, 65535};
	static const uint8_t to[][SV_NET_MAC_BYTES] = {
		{0x52, 0x54, 0, 0xAA, 0xBB, 0xCC}, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		{1, 0, 0x5e, 0, 0, 1}, {2, 2, 2, 2, 2, 2}};
	static uint8_t data[SV_NET_FRAME_MAX + 64];
	uint8_t kind = next_byte();
	unsigned int count = 1;
	size_t length = kind & 0x40 && kind < 0xF0 ? next_short() : lengths[kind % 12];

	if (kind >= 0xF8)
		length = sizeof(data);
	else if (kind >= 0xF0)
		count = 90; // more than a batch
	memset(data, next_byte(), 128);
	memset(data, 0, SV_NET_HEADER);
	memcpy(data + SV_NET_HEADER, to[kind % 4], SV_NET_MAC_BYTES);
	if (kind & 0x20) {
		data[SV_NET_HEADER + 12] = 0x81;
		data[SV_NET_HEADER + 13] = 0;
		data[SV_NET_HEADER + 14] = 0;
	}
	while (count--)
		send(peers[pair], data, length, MSG_DONTWAIT);
}

void drain(int fd)
{
	uint8_t byte;

	for (unsigned int i = 0; i < 1000 && recv(fd, &byte, 1, MSG_DONTWAIT) >= 0; i++)
		;
}

// A command as a driver would write it, or nearly.
static void command(struct guest_ring *ring)
{
	struct guest_buffer buffers[4] = {{GUEST_BUFFERS, 2}};
	uint8_t *memory = guest_at(GUEST_BUFFERS, 0x400);
	uint8_t class = next_byte() % 7, number = next_byte() % 7;
	unsigned int count = 1, length = next_byte(), split = next_byte();

	memory[0] = class;
	memory[1] = number;
	for (unsigned int i = 0; i < 10; i++)
		memory[2 + i] = next_byte();
	// Small numbers are more often right: a mode, a number of pairs, a VLAN.
	if (length & 0x80) {
		memory[2] %= 5;
		memory[3] = length & 0x40 ? 0 : memory[3];
	}
	if (class == VIRTIO_NET_CTRL_MAC && !number) {
		uint32_t unicast = next_byte(), multicast = next_byte();
		uint32_t macs[2] = {unicast, multicast};

		macs[0] = macs[0] < 0xF0 ? macs[0] % 80 : UINT32_MAX;
		macs[1] = macs[1] < 0xF0 ? macs[1] % 80 : UINT32_MAX;
		memcpy(memory + 2, &macs[0], 4);
		memcpy(memory + 6 + 6 * (macs[0] % 80), &macs[1], 4);
		length = 8 + 6 * (macs[0] % 80 + macs[1] % 80) - (split >= 0xC0);
	}
	buffers[count++] = (struct guest_buffer){GUEST_BUFFERS + 2, length ? length : 1};
	if (split & 1 && length > 5) {
		buffers[count - 1].len = 5;
		buffers[count++] = (struct guest_buffer){GUEST_BUFFERS + 7, length - 5};
	}
	buffers[count] = (struct guest_buffer){guest_address(), 1 + (split & 2)};
	guest_add(ring, buffers, count + 1, count + (split >= 0xFC), split & 4);
}

static void offer(unsigned int index, uint8_t kind)
{
	struct guest_ring *ring = &world.rings[index];

	switch (kind_of(index)) {
	case SV_NET_RECEIVE: guest_add_any(ring, GUEST_WRITE_ALL); break;
	case SV_NET_TRANSMIT: guest_add_any(ring, GUEST_WRITE_NONE); break;
	default:
		if (kind & 0x10)
			command(ring);
		else
			guest_add_any(ring, GUEST_WRITE_LAST);
	}
	if (kind & 0x20 || threads())
		eventfd_write(kicks[index], 1);
}

void act(void)
{
	uint8_t kind = next_byte();

	switch (kind % 8) {
	case 0: guest_scribble(); break;
	case 1:
	case 2:
	case 3: offer(next_byte() % world.count, kind); break;
	case 4:
	case 5: send_frame(kind / 8 % world.pairs); break;
	case 6: drain(peers[kind / 8 % world.pairs]); break;
	default:
		if (kind >= 0xF0)
			world.gone[next_byte() % world.pairs] = true;
		else if (kind >= 0xC0 && threads())
			guest_storm();
		else
			eventfd_write(kicks[next_byte() % world.count], 1);
	}
}

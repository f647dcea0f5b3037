// From the guest to the host: the ring is kept full.
#include "netgen.h"

#include <linux/virtio_net.h>

#define WAIT_MS 10000

static void make_frames(struct guest *guest, const struct options *options)
{
	for (unsigned int i = 0; i < guest->slots; i++) {
		uint8_t *at = guest_slot(guest, i);
		struct virtio_net_hdr_v1 header = {0};

		frame_header(options, (struct virtio_net_hdr *)&header);
		*(struct virtio_net_hdr_v1 *)at = header;
		frame_make(options, at + HEADER, (uint16_t)i);
		frame_stamp(options, at + HEADER, i);
	}
}

// Take what was sent; with `next` not NULL the same slots carry the next frames.
static uint64_t take(struct guest *guest, const struct options *options, uint64_t *next)
{
	uint64_t count = 0;
	int slot;

	for (; (slot = ring_take(guest->ring, NULL)) >= 0; count++) {
		if ((unsigned int)slot >= guest->slots)
			fail("the back end returned slot %d", slot);
		if (!next)
			continue;
		frame_stamp(options, guest_slot(guest, (unsigned int)slot) + HEADER, (*next)++);
		ring_add_again(guest->ring, (unsigned int)slot);
	}
	return count;
}

// As Linux's driver does, a call is wanted when three quarters of what is on the way were sent.
static void await(struct guest *guest, unsigned int on_the_way)
{
	if (ring_arm(guest->ring, (uint16_t)(on_the_way * 3 / 4)))
		return;
	if (!ring_wait(guest->ring, WAIT_MS))
		fail("the back end has %u frames and did nothing for %d s", on_the_way,
		     WAIT_MS / 1000);
}

void transmit_run(const struct options *options, struct result *result)
{
	struct checker *checker = checker_start(options);
	struct guest guest = {0};
	uint64_t next, done = 0;
	struct meter meter = {0};
	struct span span;

	guest_open(&guest, options);
	make_frames(&guest, options);
	guest_start(&guest);
	cost_open(&meter.cost, options->pid);
	span_begin(&span, options->seconds);
	next = guest.slots;
	while (!span_over(&span, done, &meter, result)) {
		uint64_t count = take(&guest, options, &next);

		ring_kick(guest.ring);
		done += count;
		if (!count)
			await(&guest, guest.slots);
	}
	while (done < next) {
		done += take(&guest, options, NULL);
		if (done < next)
			await(&guest, 0);
	}
	checker_finish(checker, next, result);
	result->kicks = guest.ring->kicks;
	result->calls = guest.ring->calls;
	guest_stop(&guest);
}

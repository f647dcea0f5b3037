// From the host to the guest: packets are sent into the interface as fast as one processor can,
// while the guest takes what comes and gives the buffers back.
#include "netgen.h"

#include <stdlib.h>
#include <string.h>

#include <linux/virtio_net.h>

#define MAX_BUFFERS 1024 // of a frame
#define LOST_MS 1000 // what didn't come for so long was dropped

struct receiver {
	const struct options *options;
	struct guest guest;
	struct sender *sender;
	uint64_t frames, verified;
	uint64_t next;                   // above all numbers that came
	uint64_t gone;                   // frames below this are on the way no more
	uint8_t *whole;                  // a frame in one piece
	uint16_t *idle;                  // slots that are held back
	unsigned int idle_count;
	unsigned int per_frame;          // slots that a frame takes
};

// With bursts no buffer is in the ring when the last frame has come: what the frames on the way
// need is there already, so the slot is held back.
static bool is_spare(const struct receiver *receiver)
{
	uint64_t frames = sender_sent(receiver->sender) - receiver->next;
	uint64_t free = (uint16_t)(receiver->guest.ring->avail_next - receiver->guest.ring->used_next);

	return receiver->options->burst && free >= frames * receiver->per_frame;
}

static void give_back(struct receiver *receiver, unsigned int slot)
{
	if (is_spare(receiver))
		receiver->idle[receiver->idle_count++] = (uint16_t)slot;
	else
		ring_add_again(receiver->guest.ring, slot);
}

static unsigned int take_buffer(struct receiver *receiver, uint32_t *written)
{
	int slot = ring_take(receiver->guest.ring, written);

	if (slot < 0)
		fail("a part of a frame came without the rest");
	if ((unsigned int)slot >= receiver->guest.slots || *written > receiver->guest.room)
		fail("the back end wrote %u bytes into slot %d", *written, slot);
	return (unsigned int)slot;
}

// The frame's number. Its parts are copied together only if all of it is verified: else its head is
// in the first buffer.
static uint64_t check(struct receiver *receiver, const unsigned int *slots, const uint32_t *written,
		      unsigned int count)
{
	const struct options *options = receiver->options;
	bool whole = receiver->frames % SAMPLE == 0;
	const uint8_t *frame = guest_slot(&receiver->guest, slots[0]);
	const struct virtio_net_hdr_v1 *header = (const void *)frame;
	size_t length = 0;

	if (options->gso && (header->gso_type != VIRTIO_NET_HDR_GSO_TCPV4 ||
			     header->gso_size != MSS))
		fail("a frame came without its segmentation");
	for (unsigned int i = 0; i < count; i++) {
		if (whole)
			memcpy(receiver->whole + length, guest_slot(&receiver->guest, slots[i]),
			       written[i]);
		length += written[i];
	}
	receiver->verified += whole;
	return frame_check(options, (whole ? receiver->whole : frame) + HEADER, length - HEADER,
			   whole);
}

// One frame, the first buffer of which is used.
static void take_frame(struct receiver *receiver)
{
	const struct virtio_net_hdr_v1 *header;
	unsigned int slots[MAX_BUFFERS], count = 1;
	uint32_t written[MAX_BUFFERS];
	uint64_t sequence;

	slots[0] = take_buffer(receiver, &written[0]);
	header = (const void *)guest_slot(&receiver->guest, slots[0]);
	if (receiver->options->mergeable)
		count = header->num_buffers;
	if (!count || count > MAX_BUFFERS)
		fail("a frame in %u buffers", count);
	for (unsigned int i = 1; i < count; i++)
		slots[i] = take_buffer(receiver, &written[i]);
	sequence = check(receiver, slots, written, count);
	if (sequence < receiver->next)
		fail("frame %lu came after one with a higher number", sequence);
	receiver->next = sequence + 1;
	if (receiver->gone < receiver->next)
		receiver->gone = receiver->next;
	receiver->frames++;
	for (unsigned int i = 0; i < count; i++)
		give_back(receiver, slots[i]);
}

static bool take_frames(struct receiver *receiver)
{
	const struct ring *ring = receiver->guest.ring;
	uint64_t before = receiver->frames;

	while (__atomic_load_n(&ring->used->idx, __ATOMIC_ACQUIRE) != ring->used_next)
		take_frame(receiver);
	ring_kick(receiver->guest.ring);
	return receiver->frames != before;
}

// Take what came, or wait until something does.
static void take_or_wait(struct receiver *receiver)
{
	if (take_frames(receiver) || ring_arm(receiver->guest.ring, 0) ||
	    ring_wait(receiver->guest.ring, LOST_MS))
		return;
	// What is on the way never comes.
	receiver->gone = sender_sent(receiver->sender);
}

static unsigned int room(const struct receiver *receiver)
{
	uint64_t out = sender_sent(receiver->sender) - receiver->gone;

	return out < receiver->options->window ? receiver->options->window - (unsigned int)out : 0;
}

// A batch of frames into the tap, then all that came out of it.
static void turn(struct receiver *receiver)
{
	if (room(receiver) && sender_send(receiver->sender, room(receiver)))
		take_frames(receiver);
	else
		take_or_wait(receiver);
}

// A window of frames into the tap, then the buffers into the ring, then all frames out. The driver
// sleeps until the first call; then it is at work until the last frame, as one that can't keep up.
static void burst(struct receiver *receiver)
{
	uint64_t last;

	while (room(receiver))
		sender_send(receiver->sender, room(receiver));
	while (receiver->idle_count && !is_spare(receiver))
		ring_add_again(receiver->guest.ring, receiver->idle[--receiver->idle_count]);
	ring_kick(receiver->guest.ring);
	take_or_wait(receiver);
	last = now_ns();
	while (receiver->gone < sender_sent(receiver->sender)) {
		if (take_frames(receiver))
			last = now_ns();
		else if (now_ns() - last > LOST_MS * 1000000ull)
			receiver->gone = sender_sent(receiver->sender);
	}
}

void receive_run(const struct options *options, struct result *result)
{
	struct receiver *receiver = calloc(1, sizeof(*receiver));
	struct meter meter = {0};
	struct span span;

	receiver->options = options;
	receiver->idle = calloc(options->queue_size, sizeof(*receiver->idle));
	guest_open(&receiver->guest, options);
	receiver->whole = malloc((size_t)MAX_BUFFERS * receiver->guest.room);
	receiver->per_frame = (HEADER + options->length + receiver->guest.room - 1) /
			      receiver->guest.room;
	guest_start(&receiver->guest);
	receiver->sender = sender_open(options);
	cost_open(&meter.cost, options->pid);
	span_begin(&span, options->seconds);
	while (!span_over(&span, receiver->frames, &meter, result))
		(options->burst ? burst : turn)(receiver);
	while (receiver->gone < sender_sent(receiver->sender))
		take_or_wait(receiver);
	result->verified = receiver->verified;
	result->lost = sender_sent(receiver->sender) - receiver->frames;
	result->kicks = receiver->guest.ring->kicks;
	result->calls = receiver->guest.ring->calls;
	guest_stop(&receiver->guest);
}

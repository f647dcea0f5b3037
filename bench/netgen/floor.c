// The floor: bare system calls on the tap, with as many buffers as a guest has.
#include "netgen.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <linux/if_tun.h>
#include <linux/virtio_net.h>

#define TURN 32u
#define STALL_NS 10000000000ull

static void meter_thread(struct meter *meter, pthread_t thread)
{
	meter->cost.count = 1;
	if (pthread_getcpuclockid(thread, &meter->cost.clocks[0]))
		fail("a thread without a clock");
}

void floor_transmit(const struct options *options, struct result *result)
{
	struct checker *checker = checker_start(options);
	unsigned int slots = options->window ? options->window : options->queue_size;
	uint32_t bytes = HEADER + options->length, stride = (bytes + SEGMENT - 1) / SEGMENT * SEGMENT;
	struct guest_memory memory;
	uint8_t *frames;
	uint64_t sent = 0;
	struct meter meter = {0};
	struct span span;

	make_memory(&memory, (uint64_t)slots * stride);
	frames = memory.base;
	for (unsigned int i = 0; i < slots; i++) {
		frame_header(options, (struct virtio_net_hdr *)(frames + i * stride));
		frame_make(options, frames + i * stride + HEADER, (uint16_t)i);
	}
	pin_to(options->floor_pin);
	meter_thread(&meter, pthread_self());
	span_begin(&span, options->seconds);
	while (!span_over(&span, sent, &meter, result)) {
		for (unsigned int i = 0; i < TURN; i++, sent++) {
			uint8_t *frame = frames + sent % slots * stride;

			frame_stamp(options, frame + HEADER, sent);
			if (write(options->tap, frame, bytes) != (ssize_t)bytes)
				fail("the tap takes no frame: %s", strerror(errno));
		}
	}
	checker_finish(checker, sent, result);
}

struct reader {
	const struct options *options;
	uint32_t stride;
	unsigned int slots;
	uint8_t *buffers;
	uint64_t frames; // atomic
	uint64_t due;    // atomic: with bursts, so many are or were in the tap
	uint64_t spent;  // atomic: with bursts, ns of CPU time while there were some
	bool stop;       // atomic
};

static uint64_t load(const uint64_t *value)
{
	return __atomic_load_n(value, __ATOMIC_ACQUIRE);
}

static void read_one(struct reader *reader)
{
	uint64_t frames = reader->frames;
	uint8_t *at = reader->buffers + frames % reader->slots * reader->stride;
	ssize_t length = read(reader->options->tap, at, reader->stride);

	if (length != (ssize_t)(HEADER + reader->options->length))
		fail("the tap gives %zd bytes: %s", length, strerror(errno));
	__atomic_store_n(&reader->frames, frames + 1, __ATOMIC_RELEASE);
}

static uint64_t own_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static void read_burst(struct reader *reader)
{
	uint64_t due = load(&reader->due), before;

	if (due == reader->frames) {
		sched_yield();
		return;
	}
	before = own_ns();
	while (reader->frames < due)
		read_one(reader);
	__atomic_add_fetch(&reader->spent, own_ns() - before, __ATOMIC_RELEASE);
}

static void *read_all(void *argument)
{
	struct reader *reader = argument;

	pin_to(reader->options->floor_pin);
	while (!__atomic_load_n(&reader->stop, __ATOMIC_RELAXED))
		(reader->options->burst ? read_burst : read_one)(reader);
	return NULL;
}

static void set_tap(const struct options *options)
{
	unsigned int offloads = options->gso ? TUN_F_CSUM | TUN_F_TSO4 : 0;

	if (ioctl(options->tap, TUNSETOFFLOAD, offloads) ||
	    fcntl(options->tap, F_SETFL, fcntl(options->tap, F_GETFL) & ~O_NONBLOCK))
		fail("--floor %d: %s", options->tap, strerror(errno));
}

// All that were sent must come: nobody drops any.
static void drain(struct reader *reader, const struct sender *sender)
{
	uint64_t limit = now_ns() + STALL_NS;

	__atomic_store_n(&reader->due, sender_sent(sender), __ATOMIC_RELEASE);
	while (load(&reader->frames) < sender_sent(sender)) {
		if (now_ns() > limit)
			fail("of %lu frames %lu came out of the tap", sender_sent(sender),
			     load(&reader->frames));
		sched_yield();
	}
}

// The last frames, which still lie in the buffers.
static void verify(const struct reader *reader, struct result *result)
{
	uint64_t frames = load(&reader->frames);
	uint64_t first = frames > reader->slots ? frames - reader->slots : 0;

	for (uint64_t i = first; i < frames; i++, result->verified++)
		if (frame_check(reader->options,
				reader->buffers + i % reader->slots * reader->stride + HEADER,
				reader->options->length, true) != i)
			fail("frame %lu is not where it must be", i);
}

void floor_receive(const struct options *options, struct result *result)
{
	struct sender *sender = sender_open(options);
	struct reader reader = {.options = options};
	struct guest_memory memory;
	pthread_t thread;
	struct meter meter = {0};
	struct span span;

	set_tap(options);
	reader.stride = (HEADER + options->length + SEGMENT - 1) / SEGMENT * SEGMENT;
	// The memory that a guest has in its ring.
	reader.slots = options->queue_size * SEGMENT / reader.stride;
	make_memory(&memory, (uint64_t)reader.slots * reader.stride);
	reader.buffers = memory.base;
	if (pthread_create(&thread, NULL, read_all, &reader))
		fail("no thread");
	if (options->burst)
		meter.spent = &reader.spent;
	else
		meter_thread(&meter, thread);
	span_begin(&span, options->seconds);
	while (!span_over(&span, load(&reader.frames), &meter, result)) {
		uint64_t out = sender_sent(sender) - load(&reader.frames);

		if (out < options->window &&
		    sender_send(sender, options->window - (unsigned int)out))
			continue;
		if (options->burst)
			drain(&reader, sender);
		else
			sched_yield();
	}
	drain(&reader, sender);
	verify(&reader, result);
	__atomic_store_n(&reader.stop, true, __ATOMIC_RELAXED);
	// One more, to end it where it waits for a frame.
	while (!options->burst && !sender_send(sender, 1))
		sched_yield();
	pthread_join(thread, NULL);
}

// The data plane of small devices, whose queues are not hot: one thread serves all queues of a
// device. What kind of device it is says a table of functions (struct sv_ring_kind).
//
// Everything of a device is touched by one thread at a time: by its own while a queue runs,
// else by whoever makes control calls (Python's main thread, the GIL released). A control call
// that comes while the thread runs is done by the thread, between two batches. So a kind needs
// no lock.
#pragma once

#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "virtq/memory.h"
#include "virtq/virtq.h"

#define SV_RING_MAX_QUEUES 64
// Descriptors of the host's side that a device may wait for.
#define SV_RING_MAX_FDS 32

struct sv_ring_device;

// Of each queue; what its kind counts follows in the same record. Written by one thread at a
// time, read by anyone at any time.
struct sv_ring_counters {
	uint64_t chains; // given back to the driver
	uint64_t calls;  // interrupts that the guest was sent
	uint64_t kicks;  // wake-ups by the driver
	uint64_t broken; // 1: the driver broke the rules, the queue stopped
};

struct sv_ring_place {
	unsigned int size;
	uint64_t desc, avail, used; // guest-physical
	uint16_t base;
	int kick_fd;                // stays the caller's, open while the ring runs; -1: poll
	int call_fd, err_fd;        // duplicated; -1: none
};

// ---- for Python -------------------------------------------------------------------------------

// Stops what still runs.
void sv_ring_destroy(struct sv_ring_device *device);

// Regions are added and removed while no queue runs (-EBUSY).
int sv_ring_add_region(struct sv_ring_device *device, uint64_t guest_addr, uint64_t size,
		       uint64_t offset, int fd);
int sv_ring_remove_region(struct sv_ring_device *device, uint64_t guest_addr, uint64_t size);
int sv_ring_clear_regions(struct sv_ring_device *device);

// What the driver acknowledged. No queue runs (-EBUSY).
int sv_ring_set_features(struct sv_ring_device *device, uint64_t features);

// As after power-on, but for guest memory. No queue runs (-EBUSY).
int sv_ring_reset(struct sv_ring_device *device);

// Serve a queue; the first one starts the thread. -EINVAL: the ring does not hold; -EBUSY: it
// runs.
int sv_ring_start(struct sv_ring_device *device, unsigned int index,
		  const struct sv_ring_place *place);

// The next available index, or -EINVAL: it does not run. When it returns nothing touches guest
// memory for this queue any more. What was taken and not used counts as available again. The
// last one ends the thread.
int sv_ring_stop(struct sv_ring_device *device, unsigned int index);

// Another call descriptor (duplicated; -1: none) for a queue that may run.
int sv_ring_set_call(struct sv_ring_device *device, unsigned int index, int fd);

// Why the queue is broken, NULL if it isn't. Static text.
const char *sv_ring_broken(struct sv_ring_device *device, unsigned int index);

// Readable when the kind has something to tell (sv_ring_notify); the reader empties it.
int sv_ring_notify_fd(const struct sv_ring_device *device);

// ---- for kinds --------------------------------------------------------------------------------

// What a queue waits for after a batch.
enum sv_ring_next {
	SV_RING_MORE,  // nothing: the next batch follows after a look at everything else
	SV_RING_EMPTY, // the driver's kick
	SV_RING_WAITS, // sv_ring_due or `wait_until`; kicks are not listened to
};

struct sv_ring_queue {
	struct sv_virtq vq;
	struct sv_ring_counters *counters;
	bool running;
	bool due;            // to be served before the next sleep
	bool listens;        // the driver was asked for kicks
	bool call_due;       // chains were given back that the driver was not told of
	bool wants_kick;
	int kick_fd, call_fd, err_fd;
	uint64_t wait_until; // ns, monotonic: serve the queue then; 0: whenever else it is due
};

// All are called by the thread that has the device. Those that may be NULL say so.
struct sv_ring_kind {
	// One batch of a queue that runs; bounded, since control calls and the other queues wait
	// for its end. Chains are taken by sv_virtq_pop(&queue->vq, device->chain) and given back
	// by sv_ring_push.
	enum sv_ring_next (*serve)(struct sv_ring_device *device, unsigned int index);
	// Descriptor `slot` (sv_ring_await) has `events`: make queues due. If it is not to be
	// reported again at once, change what is awaited. NULL: none are awaited.
	void (*ready)(struct sv_ring_device *device, unsigned int slot, short events);
	// The queue was started (it will be served next) or is about to stop: chains that the
	// kind holds are given back by sv_virtq_unpop, the last one taken first. May be NULL.
	void (*started)(struct sv_ring_device *device, unsigned int index);
	void (*stopping)(struct sv_ring_device *device, unsigned int index);
	// The driver has acknowledged device->features. May be NULL.
	void (*negotiated)(struct sv_ring_device *device);
	// As after power-on. May be NULL.
	void (*reset)(struct sv_ring_device *device);
	// Free device->own. May be NULL.
	void (*destroy)(struct sv_ring_device *device);
};

typedef int (*sv_ring_call_fn)(struct sv_ring_device *device, void *argument);

struct sv_ring_device {
	const struct sv_ring_kind *kind;
	void *own;               // the kind's
	struct sv_memory memory; // changes only while no queue runs
	uint64_t features;       // acknowledged
	struct sv_chain *chain;  // room for the chain at hand; its content lasts for one batch
	unsigned int count, max_size;
	unsigned int running;    // queues, and so whether there is a thread
	bool stop;
	int wake_fd, notify_fd;
	pthread_t thread;
	// The control call that the thread is to do. `call` is NULL when it is done.
	pthread_mutex_t lock;
	pthread_cond_t done;
	sv_ring_call_fn call;
	void *argument;
	int result;
	struct pollfd awaited[SV_RING_MAX_FDS]; // fd -1 or no events: nothing
	struct sv_ring_queue *queues;
};

// `counters`: a record of `record_bytes` a queue, which begins with struct sv_ring_counters;
// zeroed or a predecessor's, valid until destroy. `own` is the kind's to free if this fails.
// NULL with *error = negative errno.
struct sv_ring_device *sv_ring_create(const struct sv_ring_kind *kind, void *own,
				      unsigned int queues, unsigned int queue_size,
				      void *counters, size_t record_bytes, int *error);

// Let the thread that has the device call `call`, or call it here if none does: for control
// calls of a kind. Returns what it returned.
int sv_ring_call(struct sv_ring_device *device, sv_ring_call_fn call, void *argument);

// Give a chain back; the driver is told after the batch.
void sv_ring_push(struct sv_ring_device *device, unsigned int index, uint16_t head,
		  uint32_t written);

// Serve the queue before the next sleep, if it runs.
void sv_ring_due(struct sv_ring_device *device, unsigned int index);

// Wait for these poll events of `fd` (the caller's; -1 or 0 events: don't) and call
// kind->ready with `slot`, a number below SV_RING_MAX_FDS.
void sv_ring_await(struct sv_ring_device *device, unsigned int slot, int fd, short events);

// Make sv_ring_notify_fd readable.
void sv_ring_notify(struct sv_ring_device *device);

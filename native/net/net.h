// The data plane of a net worker: frames between virtqueues and a tap (virtio 1.2, 5.1).
//
// Queues 2n and 2n+1 receive and transmit through tap n; the last queue, if there is one
// without a partner, is the control queue. Each running queue has a thread of its own. Control
// calls come from one thread (Python's, the GIL released).
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "limit/limit.h"
#include "virtq/memory.h"
#include "virtq/virtq.h"

#define SV_NET_MAX_PAIRS 16
#define SV_NET_MAC_BYTES 6
// struct virtio_net_hdr_v1, in front of every frame in rings and on the tap.
#define SV_NET_HEADER 12

// Written by the queue's thread alone, read by anyone at any time.
struct sv_net_counters {
	uint64_t packets;  // passed on
	uint64_t bytes;    // of their frames, without the header
	uint64_t dropped;  // no buffer long enough, or filtered
	uint64_t errors;   // that the tap refused: offload headers that lie, runts, giants
	uint64_t wakeups;  // times the thread slept and woke
	uint64_t calls;    // interrupts that the guest was sent
	uint64_t broken;   // 1: the driver broke the rules, the queue stopped
	uint64_t commands; // of the control queue
};

struct sv_net;

// What the driver has set over the control queue, in memory that outlives a worker: its
// successor goes on with it. sv_net_state_size() bytes, zeroed at first; checked when read.
struct sv_net_state;
size_t sv_net_state_size(void);

// `taps`: `pairs` descriptors of one interface (IFF_MULTI_QUEUE if several), non-blocking, with
// headers of SV_NET_HEADER bytes, little endian; they stay the caller's, open until destroy. -1:
// there is no tap, nothing is received, what is sent is dropped.
// `counters`: one a queue, zeroed, valid until destroy. `limits`: for all queues that receive,
// then for all that transmit. `state`: valid until destroy, or NULL. NULL with *error = negative
// errno.
struct sv_net *sv_net_create(const int *taps, unsigned int pairs, bool control,
			     unsigned int queue_size, const uint8_t *mac,
			     const struct sv_rate *limits,
			     struct sv_net_counters *counters, struct sv_net_state *state,
			     int *error);
// Stops what still runs.
void sv_net_destroy(struct sv_net *net);

// Regions are added and removed while no queue runs (-EBUSY).
int sv_net_add_region(struct sv_net *net, uint64_t guest_addr, uint64_t size, uint64_t offset,
		      int fd);
int sv_net_remove_region(struct sv_net *net, uint64_t guest_addr, uint64_t size);
int sv_net_clear_regions(struct sv_net *net);

// What the driver acknowledged: the tap's offloads follow. Negative errno: the tap refuses.
int sv_net_set_features(struct sv_net *net, uint64_t features);

// Filters, MAC address, active queue pairs and offloads as after power-on.
int sv_net_reset(struct sv_net *net);

// The MAC address that the driver has set, or the first one.
void sv_net_mac(struct sv_net *net, uint8_t *mac);

// While the link is down frames are dropped, both ways. Any time.
void sv_net_set_link(struct sv_net *net, bool up);

struct sv_net_ring {
	unsigned int size;
	uint64_t desc, avail, used; // guest-physical
	uint16_t base;
	int kick_fd;                // stays the caller's, open while the ring runs; -1: poll
	int call_fd, err_fd;        // duplicated; -1: none
};

// Start the queue's thread. -EINVAL: the ring does not hold; -EBUSY: it runs.
int sv_net_start(struct sv_net *net, unsigned int index, const struct sv_net_ring *ring);

// End the thread; the next available index, or -EINVAL: it does not run. When it returns
// nothing touches guest memory for this queue any more. What was taken and not used counts
// as available again.
int sv_net_stop(struct sv_net *net, unsigned int index);

// Another call descriptor (duplicated; -1: none) for a queue that may run.
int sv_net_set_call(struct sv_net *net, unsigned int index, int fd);

// Why the queue is broken, NULL if it isn't. Static text.
const char *sv_net_broken(struct sv_net *net, unsigned int index);

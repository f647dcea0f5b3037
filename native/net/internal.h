// Between the files of native/net only.
#pragma once

#include <pthread.h>
#include <sys/uio.h>

#include "include/polling.h"
#include "net/net.h"
#include "virtq/signals.h"

// A frame with its header is at most this long: 64 KiB of a GSO frame, its Ethernet header and
// a VLAN tag. What doesn't fit the guest's buffers at once goes through a bounce buffer.
#define SV_NET_FRAME_MAX (SV_NET_HEADER + 65536 + 18)
// Buffers of the guest that one readv fills directly.
#define SV_NET_IOVS 256
#define SV_NET_MAC_ENTRIES 64
#define SV_NET_BURST_NS 100000000 // of a limit
#define SV_NET_BATCH 64 // frames or buffers between two looks at everything else

// Which frames the guest wants (virtio 1.2, 5.1.6.5). Threads work on copies: the control
// queue changes the original under `lock` and raises `version`.
struct sv_net_filter {
	uint8_t mac[SV_NET_MAC_BYTES];
	// Not bool: they come back from memory that a predecessor wrote.
	uint8_t promiscuous, all_multicast, all_unicast;
	uint8_t no_multicast, no_unicast, no_broadcast;
	uint8_t unicast_overflow, multicast_overflow;
	unsigned int unicast_count, multicast_count;
	uint8_t unicast[SV_NET_MAC_ENTRIES][SV_NET_MAC_BYTES];
	uint8_t multicast[SV_NET_MAC_ENTRIES][SV_NET_MAC_BYTES];
	uint64_t vlans[4096 / 64];
};

// A chain of the receive queue that waits for a frame.
struct sv_net_held {
	uint16_t head;
	uint16_t iov_count;
	uint64_t bytes;
};

enum sv_net_kind { SV_NET_RECEIVE, SV_NET_TRANSMIT, SV_NET_CONTROL };

struct sv_net_queue {
	struct sv_net *net;
	struct sv_virtq vq;
	struct sv_net_counters *counters;
	enum sv_net_kind kind;
	int tap;
	pthread_t thread;
	bool running;       // control thread's
	bool stop;          // atomic: control thread asks, queue's thread obeys
	bool tap_empty;     // receiving: it had nothing more
	bool chain_waits;   // transmitting: the tap did not take `chain` yet
	bool call_due;
	unsigned int patience; // rounds that may pass without a call
	struct sv_polling polling;
	uint64_t features;   // of this run
	int wake_fd, kick_fd;
	struct sv_signals signals;
	uint64_t wait_until; // ns: the limit lets nothing through before; 0: it does
	struct sv_chain chain;
	// Receiving only.
	struct sv_net_filter filter;
	uint64_t filter_version;
	uint32_t expected;   // bytes that a frame usually needs
	uint32_t waiting;    // bytes of a frame that has not got buffers enough yet; 0: none
	uint64_t direct;     // how many of them are in the chains held, the rest in `bounce`
	unsigned int held_first, held_count, iov_first, held_iovs;
	uint64_t held_bytes;
	struct sv_net_held held[2 * SV_NET_IOVS];
	struct iovec iov[2 * SV_NET_IOVS];    // of the chains held
	struct iovec vector[SV_NET_IOVS + 1]; // the same, merged, and the bounce buffer
	uint8_t *bounce;
};

// Two copies: a command that was cut off by the worker's end leaves the older one valid.
struct sv_net_state {
	uint64_t generation; // the current copy is that of its lowest bit; 0: none yet
	struct sv_net_settings {
		struct sv_net_filter filter;
		uint64_t offloads; // features of the guest's side that the tap may use now
		uint32_t pairs;    // that receive
	} copies[2];
};

struct sv_net {
	struct sv_memory memory;
	uint64_t features;
	uint8_t mac[SV_NET_MAC_BYTES];
	pthread_mutex_t lock;    // of settings
	struct sv_net_settings settings;
	bool link_down;          // atomic
	bool resumed;            // the settings are those of a predecessor
	struct sv_net_state *state;
	uint64_t generation;     // of `state`, when we last read or wrote it
	uint64_t filter_version; // atomic
	struct sv_bucket buckets[2]; // receive, transmit
	unsigned int pairs, count, max_size;
	struct sv_net_queue queues[];
};

// filter.c
void sv_net_filter_reset(struct sv_net_filter *filter, const uint8_t *mac);
// Whether the guest wants the frame that begins with these bytes (at least 18, or all).
bool sv_net_filter_wants(const struct sv_net_filter *filter, uint64_t features,
			 const uint8_t *frame, size_t len);

// queue.c
int sv_net_queue_init(struct sv_net_queue *queue);
void sv_net_queue_deinit(struct sv_net_queue *queue);
int sv_net_queue_run(struct sv_net_queue *queue, const struct sv_net_ring *ring);
int sv_net_queue_end(struct sv_net_queue *queue);

// The same memory in as few pieces as possible (`to` may be `from`); how many. Drivers cut what
// lies side by side into pages, and to the kernel each piece is a copy of its own.
static inline unsigned int sv_net_merge(const struct iovec *from, unsigned int count,
					struct iovec *to)
{
	unsigned int last = 0;

	to[0] = from[0];
	for (unsigned int i = 1; i < count; i++) {
		if ((uint8_t *)to[last].iov_base + to[last].iov_len == from[i].iov_base)
			to[last].iov_len += from[i].iov_len;
		else
			to[++last] = from[i];
	}
	return last + 1;
}

// A batch is over: the driver is to see what is in the used ring.
static inline bool sv_net_is_batch(const struct sv_virtq *vq)
{
	uint16_t count = (uint16_t)(vq->used_idx - vq->used_published);

	return count >= SV_NET_BATCH || 4u * count >= vq->size;
}

// One batch of each kind. True: call again at once; false: nothing to do until a wake-up.
bool sv_net_receive(struct sv_net_queue *queue);
bool sv_net_transmit(struct sv_net_queue *queue);
bool sv_net_control(struct sv_net_queue *queue);
// The chains that wait for frames are available again.
void sv_net_release_held(struct sv_net_queue *queue);

// settings.c. All under net->lock.
// Somebody else has written the state since we last looked: a predecessor that served until now.
bool sv_net_state_moved(const struct sv_net *net);
// A predecessor's settings, if there are any that make sense. True: there are.
bool sv_net_load(struct sv_net *net);
void sv_net_save(struct sv_net *net);
// Tell the tap what frames the guest takes whole.
int sv_net_apply_offloads(struct sv_net *net, uint64_t offloads);
// Let this many queue pairs receive.
int sv_net_apply_pairs(struct sv_net *net, unsigned int pairs);

// virtio-net over virtio-mmio: several queue pairs, mergeable buffers, the control queue.
#pragma once
#include "mmio.h"

#define MAX_NICS 4
#define MAX_PAIRS 4
#define NET_QUEUES (2 * MAX_PAIRS + 1)
#define NET_HEADER 12 // struct virtio_net_hdr_v1
#define RX_POOL (512u << 10) // bytes of buffers of a receive queue
#define TX_POOL (512u << 10)
#define TX_BUFFER 2048u
#define GIANT (80u << 10) // more than the longest frame
#define MAX_FRAMES 65536u // of one command, each is ticked off

#define N_CSUM (1ull << 0)
#define N_GUEST_CSUM (1ull << 1)
#define N_MTU (1ull << 3)
#define N_MAC (1ull << 5)
#define N_GUEST_TSO4 (1ull << 7)
#define N_HOST_TSO4 (1ull << 11)
#define N_MRG_RXBUF (1ull << 15)
#define N_STATUS (1ull << 16)
#define N_CTRL_VQ (1ull << 17)
#define N_MQ (1ull << 22)
// MAC, STATUS, MTU, checksums and TSO both ways, MRG_RXBUF, everything of the control queue, rings
#define N_KNOWN (N_CSUM | N_GUEST_CSUM | 4 | N_MTU | N_MAC | N_GUEST_TSO4 | N_HOST_TSO4 | \
		 N_MRG_RXBUF | N_STATUS | N_CTRL_VQ | 7ull << 18 | 1ull << 21 | N_MQ | \
		 1ull << 23 | F_INDIRECT | F_EVENT_INDEX | F_VERSION_1)

#define NET_OK 0
#define NET_ERR 1

struct net_queue {
	struct desc desc[MAX_SIZE];
	struct avail avail __attribute__((aligned(64)));
	struct used used __attribute__((aligned(64)));
	u16 last_used, published;
	u32 size, slots, buffer; // `slots` buffers of `buffer` bytes in `pool`
	u8 *pool;
	bool busy[MAX_SIZE];     // by slot: the device has it
} __attribute__((aligned(4096)));

struct nic {
	struct virtio virtio;
	u64 mac;
	u32 pairs, queues; // queues that are set up; the control queue is the last
	struct net_queue *queue;
};

// What the frames of a test hold: tests/support/net_peer.py knows it too.
struct net_frame {
	u8 to[6], from[6];
	u8 type[2]; // 0x88b5: for experiments
	u16 length; // of the whole frame
	u64 number;
	u64 words[]; // net_word(number, index); a last word may be cut
} __attribute__((packed));
#define FRAME_FIXED 24u

// A batch to be built and queued, at CPL3.
struct net_batch {
	u64 to, from;          // as numbers, the first byte is the lowest
	u64 first, count, length; // length 0: mixed, see net_length
};

// What came, ticked off and counted at CPL3.
struct net_tally {
	u64 first, count;      // numbers that are expected
	u64 frames, bytes, twice, late, bad, other, buffers, largest, highest;
	u64 broken;            // the device wrote nonsense: what
	u64 header;            // first 8 bytes of the last frame's virtio header
	u8 *seen;              // MAX_FRAMES bytes
	u8 *scratch;           // GIANT bytes
	bool mergeable;
};

extern struct nic nics[MAX_NICS];
extern u32 nic_count;
extern struct net_tally tally;

bool nic_init(struct nic *nic, u64 mask, u32 size, u32 buffer);
void net_kick(struct nic *nic, u32 number, u16 before);
u64 nic_mac(struct nic *nic);
struct net_queue *control_queue(struct nic *nic);
// Takes what was sent off the ring; how many, or -1 if the device wrote nonsense.
int net_reclaim(struct nic *nic, u32 number);
// What came in since the last time, and the buffers back to the device; false: nonsense.
bool net_collect(struct nic *nic, u32 pair);
// Queue the batch, as much of it as fits; how many.
u64 net_queue_batch(struct nic *nic, u32 pair, struct net_batch *batch);
// A command; its acknowledgement, S_NONE if none came.
u8 net_control(struct nic *nic, u8 class, u8 command, const u8 *data, u32 length);
bool net_hostile(struct nic *nic, const char *kind);

// net_user.c: at CPL3.
u64 user_net_fill(struct net_queue *queue, struct net_batch *batch);
u64 user_net_collect(struct net_queue *queue, struct net_tally *tally);
u64 net_length(u64 number);

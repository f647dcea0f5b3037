// A vhost-user front end that loads a block back end, verifies every byte and counts what it costs.
//
// It stands for a guest: RAM in a memfd, one split ring with indirect descriptors and event index,
// a driver that takes all completions at each call.  It knows nothing of the back end but the
// published protocol, so that rivals are measured with the same hand.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>

#define SECTOR 512u
#define MAX_DEPTH 256u
#define MAX_SEGMENTS 256u
#define SLOT_SPACE 8192u // a slot's indirect table, then its header and status

// ---- options (main.c) -----------------------------------------------------------------------------
enum pattern { RANDREAD, RANDWRITE, SEQREAD, SEQWRITE, RANDRW };

struct options {
	const char *socket;
	pid_t pid;             // the back end whose CPU time counts; 0: nobody's
	enum pattern pattern;
	unsigned int depth;
	unsigned int queue_size;
	uint64_t block;        // bytes of a request
	uint64_t segment;      // bytes of a descriptor
	uint64_t span;         // bytes of the disk that are used; 0: all
	double seconds;
	uint64_t requests;     // 0: as many as `seconds` allow
	uint64_t readback;     // blocks that are read again after writes, at most
	uint64_t seed;
	bool event_index, indirect;
	bool sectors_only;     // verify each sector's header alone
	int pin;               // CPU that the generator runs on; -1: any
};

_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t now_ns(void);

// ---- the protocol (vhost.c) -----------------------------------------------------------------------
struct vhost {
	int socket;
	uint64_t features;
	bool reply_ack;
	struct virtio_blk_config config;
};

struct guest_memory {
	int fd;
	uint8_t *base; // guest physical address 0
	uint64_t size;
};

void vhost_connect(struct vhost *vhost, const char *path, uint64_t wanted);
void vhost_set_memory(struct vhost *vhost, const struct guest_memory *memory);

struct ring;
void vhost_start_ring(struct vhost *vhost, const struct guest_memory *memory,
		      const struct ring *ring);
void vhost_stop_ring(struct vhost *vhost);

// ---- the driver's ring (ring.c) -------------------------------------------------------------------
struct ring {
	unsigned int size;
	bool event_index, indirect;
	struct vring_desc *desc;
	struct vring_avail *avail;
	struct vring_used *used;
	uint64_t desc_addr, avail_addr, used_addr;
	uint16_t avail_next;   // what the back end may take
	uint16_t avail_seen;   // avail index of the last kick decision
	uint16_t used_next;
	unsigned int per_chain; // descriptors that a chain may need
	int kick_fd, call_fd;
	uint64_t kicks, calls;
};

void ring_init(struct ring *ring, struct guest_memory *memory, uint64_t address, unsigned int size);
uint64_t ring_bytes(unsigned int size);
// Make chain `head` (a slot's number) available; `table` is where its indirect table may lie.
void ring_add(struct ring *ring, struct guest_memory *memory, unsigned int slot, uint64_t table,
	      const struct vring_desc *parts, unsigned int count);
void ring_kick(struct ring *ring);
// The next finished slot, or -1.
int ring_take(struct ring *ring);
// Ask for a call at the next completion; true if one is there already.
bool ring_arm(struct ring *ring);
// Wait for a call; false if none came within `limit_ms`.
bool ring_wait(struct ring *ring, int limit_ms);

// ---- what the blocks hold (data.c) ----------------------------------------------------------------
// Every sector begins with its number and a stamp (seed and generation); the rest follows from both.
void data_fill(void *data, uint64_t sector, uint64_t count, uint64_t stamp);
// The stamp that all `count` sectors carry; fails the run if one is torn, foreign or wrong.
uint64_t data_check(const void *data, uint64_t sector, uint64_t count, bool sectors_only);
// Write a whole file of stamp `seed`, 4 KiB at a time (small folios in the page cache).
void data_prepare(const char *path, uint64_t bytes, uint64_t seed);

// ---- what it costs (cost.c) -----------------------------------------------------------------------
struct cost {
	unsigned int count;
	clockid_t clocks[64];
};

// The CPU clocks of `pid` and of all its descendants as of now.
void cost_open(struct cost *cost, pid_t pid);
uint64_t cost_ns(const struct cost *cost);

// Latencies: 16 buckets for each power of two of nanoseconds.
struct histogram {
	uint64_t buckets[64 * 16];
	uint64_t count, sum, max;
};

void histogram_add(struct histogram *histogram, uint64_t ns);
uint64_t histogram_quantile(const struct histogram *histogram, double quantile);

// ---- a run (load.c) -------------------------------------------------------------------------------
struct result {
	uint64_t requests, read, written, verified, learned;
	uint64_t elapsed_ns, backend_ns, own_ns;
	struct histogram latency;
};

void load_run(const struct options *options, struct vhost *vhost, struct guest_memory *memory,
	      struct ring *ring, struct result *result);

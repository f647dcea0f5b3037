// virtio-blk requests (virtio 1.2, 5.2.6) against one image.
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "blk/throttle.h"
#include "uring/engine.h"
#include "virtq/virtq.h"

#define SV_BLK_SECTOR 512
#define SV_BLK_ID_BYTES 20
// Limits that the config space announces.
#define SV_BLK_MAX_SECTORS 4194304u // of one discard or write-zeroes segment: 2 GiB
#define SV_BLK_MAX_SEGMENTS 16u     // of one discard or write-zeroes request
#define SV_BLK_MAX_DATA_SEGMENTS 126u

// What the host refused, for whoever is told of it: counts by SV_BLK_READ to SV_BLK_ZERO. Any
// queue's thread counts, any thread reads.
struct sv_blk_failures {
	int event_fd;          // signalled after counting; -1: nobody wants to know
	uint64_t count[5];
	int32_t error[5];      // errno of the last one
};

// The image, shared by all queues of a device. `writeback`, `size`
// and `capacity` alone change while they run.
struct sv_disk {
	int fd;
	bool readonly;
	bool direct;           // fd was opened with O_DIRECT
	bool block_device;
	bool unmap;            // discard gives space back; else it is accepted and ignored
	bool detect_zeroes;    // a write of zeroes becomes a write-zeroes request...
	bool detect_unmap;     // ... that may give space back
	bool writeback;        // else each write is durable before it completes
	bool no_nowait;        // the file system knows no RWF_NOWAIT
	bool no_zero_range;    // ... no FALLOC_FL_ZERO_RANGE
	uint64_t size;         // atomic: bytes that the image has
	uint64_t capacity;     // atomic: sectors that the guest sees: size, rounded up
	uint32_t align;        // of offsets and lengths of I/O; 1 if buffered
	uint32_t memory_align; // of buffers; 1 if buffered
	uint8_t id[SV_BLK_ID_BYTES];
	pthread_rwlock_t partial; // writes: shared; read-modify-write of a block: exclusive
	struct sv_throttle throttle;
	struct sv_blk_failures failures;
	uint64_t end;             // atomic: bytes that are known to be there; UINT64_MAX: all
	unsigned int partial_waiting; // atomic: who waits for it to be free of writes
};

#define SV_BLK_BUCKETS 28 // of latencies, see shared/statistics.py
#define SV_BLK_TIMED 4    // read, write, flush, unmap (discard and write zeroes)

// Written by the queue's thread alone, read by anyone at any time. The layout is that of the
// statistics page, shared/statistics.py.
struct sv_blk_counters {
	uint64_t reads, writes, flushes, discards, write_zeroes, others;
	uint64_t read_bytes, written_bytes, unmapped_bytes;
	uint64_t errors;       // requests that ended with another status than OK
	uint64_t inline_ops;   // done on the queue's thread, without the engine
	uint64_t bounced;      // requests that went through an aligned copy
	uint64_t wakeups;      // times the thread slept and woke
	uint64_t calls;        // interrupts that the guest was sent
	uint64_t broken;       // 1: the driver broke the rules, the queue stopped
	uint64_t throttled;    // requests that a limit made wait
	uint64_t failed[SV_BLK_TIMED];  // errors of the host
	uint64_t invalid[SV_BLK_TIMED]; // requests that were wrong
	uint64_t total_ns[SV_BLK_TIMED];
	uint64_t latency[SV_BLK_TIMED][SV_BLK_BUCKETS];
	uint64_t reserved[4]; // to a multiple of 64 bytes: queues share no cache line
};

// A request that is done and that the driver can't see yet.
struct sv_blk_done {
	uint64_t start; // sv_now_ns
	uint8_t timed;
};

struct sv_blk_request;

struct sv_blk_queue {
	struct sv_disk *disk;
	struct sv_virtq *vq;
	struct sv_engine *engine;
	struct sv_blk_counters *counters;
	struct sv_blk_request *requests; // by head
	struct iovec *iovs;              // sv_blk_iovs a head
	size_t request_bytes, iov_bytes;
	struct sv_io *deferred;      // requests that wait until no write of this queue is under way
	unsigned int busy;               // requests with the engine, deferred or held
	unsigned int writes;             // of them, those that hold disk->partial shared
	unsigned int avoid_inline;       // next so many writes don't run on this thread
	struct sv_blk_request *held;     // waits for the throttle; nothing is taken meanwhile
	uint64_t held_until;             // when to try again, sv_now_ns
	uint64_t look_at;                // when to measure the image again, sv_now_ns
	bool draining;                   // the queue is being stopped: limits don't hold
	uint64_t inline_bytes;           // since the caller last published and reset it
	struct sv_blk_done *done;        // `done_size` of them
	unsigned int done_count, done_size;
	struct sv_chain chain;
};

// `size`: the largest queue size that will be set up.
int sv_blk_init(struct sv_blk_queue *queue, struct sv_disk *disk, struct sv_virtq *vq,
		struct sv_engine *engine, struct sv_blk_counters *counters, unsigned int size);
void sv_blk_deinit(struct sv_blk_queue *queue);

// Take and start at most `budget` requests; true if there was one. What it finished at once
// is pushed, not published.
bool sv_blk_serve(struct sv_blk_queue *queue, unsigned int budget);

// Start what the throttle held back, if it may go now; true if it went.
bool sv_blk_release(struct sv_blk_queue *queue);

// Whether serve would take nothing now: only a completion or time changes that.
static inline bool sv_blk_blocked(const struct sv_blk_queue *queue)
{
	return queue->held || queue->deferred ||
	       (queue->writes &&
		__atomic_load_n(&queue->disk->partial_waiting, __ATOMIC_RELAXED));
}

// Before what is done is published: note how long it took.
void sv_blk_note_latencies(struct sv_blk_queue *queue);

// Finish what the engine has done; true if there was something.
bool sv_blk_reap(struct sv_blk_queue *queue);

// ---- between request.c (what is asked, is it right?) and execute.c (doing it) ----

struct sv_blk_segment {
	uint64_t offset; // bytes
	uint64_t length;
	bool unmap;
};

struct sv_blk_request {
	struct sv_io io;
	struct sv_blk_queue *queue;
	uint8_t *status;
	struct iovec *data;     // what is still to be transferred
	uint32_t data_count;
	uint16_t head;
	uint8_t type;           // SV_BLK_*
	bool holds_partial;     // counts in queue->writes
	bool bouncing;          // io transfers the bounce buffer
	bool syncing;           // io is the sync that ends a write-through request
	bool durable;           // every write was RWF_DSYNC: no sync needed
	bool failed;            // by the host
	bool zeroing;           // WRITE_ZEROES by written zeroes
	uint64_t start;         // when it was taken, sv_now_ns
	uint64_t offset;        // bytes in the image of what is still to be transferred
	uint64_t left;
	uint64_t in_bytes;      // writable bytes of the chain, status included
	uint64_t bytes;         // asked for, for the counters
	uint32_t segment_next, segment_count;
	uint8_t retries;
	void *bounce;
	struct iovec bounce_iov;
};

enum { SV_BLK_READ, SV_BLK_WRITE, SV_BLK_FLUSH, SV_BLK_DISCARD, SV_BLK_ZERO, SV_BLK_OTHER };

// Room for iovecs a head: data segments, crossings of regions, and the segments or zeroes of
// discard and write zeroes.
#define SV_BLK_IOVS (SV_BLK_MAX_DATA_SEGMENTS + 6)

static inline struct sv_blk_segment *sv_blk_segments(struct sv_blk_request *request)
{
	return (struct sv_blk_segment *)(request->queue->iovs + request->head * (size_t)SV_BLK_IOVS);
}

// Room for iovecs that segments don't use.
static inline struct iovec *sv_blk_zero_iov(struct sv_blk_request *request)
{
	return request->queue->iovs + request->head * (size_t)SV_BLK_IOVS + 2 * SV_BLK_MAX_SEGMENTS;
}

// See whether a regular file still has the bytes that it had (disk->end).
void sv_blk_measure(struct sv_disk *disk);

// The host refused, with a negative errno: IOERR for the guest, and somebody is told.
void sv_blk_fail(struct sv_blk_request *request, int error);

// Give the request back with a VIRTIO_BLK_S_* status.
void sv_blk_finish(struct sv_blk_request *request, uint8_t status, uint32_t written);

// Start a checked request; `lonely`: nothing else waits, so the shortest way is best.
void sv_blk_start(struct sv_blk_request *request, bool lonely);

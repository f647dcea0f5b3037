// Loads a block back end through one ring, verifies every byte and counts what it costs. A driver
// that takes all completions at each call.
#pragma once

#include <linux/virtio_blk.h>

#include "frontend/frontend.h"

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

// ---- what the blocks hold (data.c) ----------------------------------------------------------------
// Every sector begins with its number and a stamp (seed and generation); the rest follows from both.
void data_fill(void *data, uint64_t sector, uint64_t count, uint64_t stamp);
// The stamp that all `count` sectors carry; fails the run if one is torn, foreign or wrong.
uint64_t data_check(const void *data, uint64_t sector, uint64_t count, bool sectors_only);
// Write a whole file of stamp `seed`, 4 KiB at a time (small folios in the page cache).
void data_prepare(const char *path, uint64_t bytes, uint64_t seed);

// ---- how long it takes (histogram.c) --------------------------------------------------------------
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

// `capacity`: sectors of the disk.
void load_run(const struct options *options, uint64_t capacity, struct guest_memory *memory,
	      struct ring *ring, struct result *result);

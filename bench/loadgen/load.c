// A run: keeps `depth` requests on the way, verifies what comes back, measures between two instants.
#include "loadgen.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define WAIT_MS 20000
#define WARM_UP 0.1      // of the run's time

struct slot {
	uint64_t block, stamp, began;
	bool write;
};

struct load {
	const struct options *options;
	struct guest_memory *memory;
	struct ring *ring;
	struct result *result;
	struct slot slots[MAX_DEPTH];
	uint64_t *stamps;      // what a block carries; 0: not known yet
	uint8_t *busy;
	uint64_t blocks, next, random, generation;
	uint64_t area;         // guest address of the slots' space, their data after it
	unsigned int in_flight;
	bool record;           // latencies count
	bool readback;
};

static uint64_t random_next(struct load *load)
{
	load->random ^= load->random << 13;
	load->random ^= load->random >> 7;
	load->random ^= load->random << 17;
	return load->random;
}

static uint64_t pick_block(struct load *load)
{
	bool sequential = load->readback || load->options->pattern == SEQREAD ||
			  load->options->pattern == SEQWRITE;
	uint64_t block;

	// Two requests to the same block at once would have no defined outcome.
	do {
		if (sequential)
			block = load->next++ % load->blocks;
		else
			block = random_next(load) % load->blocks;
	} while (load->busy[block]);
	load->busy[block] = 1;
	return block;
}

static bool pick_write(struct load *load)
{
	if (load->readback)
		return false;
	switch (load->options->pattern) {
	case RANDWRITE:
	case SEQWRITE:
		return true;
	case RANDRW:
		return random_next(load) >> 20 & 1;
	default:
		return false;
	}
}

static uint64_t slot_address(const struct load *load, unsigned int slot)
{
	return load->area + (uint64_t)slot * SLOT_SPACE;
}

static uint64_t data_address(const struct load *load, unsigned int slot)
{
	return slot_address(load, load->options->depth) + slot * load->options->block;
}

static void submit(struct load *load, unsigned int slot)
{
	uint64_t block = load->options->block, segment = load->options->segment;
	uint64_t at = slot_address(load, slot), data = data_address(load, slot);
	struct slot *request = &load->slots[slot];
	struct virtio_blk_outhdr *header = (void *)(load->memory->base + at + 4096);
	struct vring_desc parts[MAX_SEGMENTS + 2];
	unsigned int count = 0;

	request->block = pick_block(load);
	request->write = pick_write(load);
	*header = (struct virtio_blk_outhdr){request->write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, 0,
					     request->block * (block / SECTOR)};
	load->memory->base[at + 4096 + 16] = 0xff;
	if (request->write) {
		request->stamp = load->options->seed << 32 | ++load->generation;
		data_fill(load->memory->base + data, header->sector, block / SECTOR, request->stamp);
	}
	parts[count++] = (struct vring_desc){at + 4096, 16, 0, 0};
	for (uint64_t done = 0; done < block; done += segment) {
		uint64_t length = block - done < segment ? block - done : segment;

		parts[count++] = (struct vring_desc){
			data + done, (uint32_t)length, request->write ? 0 : VRING_DESC_F_WRITE, 0};
	}
	parts[count++] = (struct vring_desc){at + 4096 + 16, 1, VRING_DESC_F_WRITE, 0};
	request->began = now_ns();
	ring_add(load->ring, load->memory, slot, at, parts, count);
	load->in_flight++;
}

static void finish(struct load *load, unsigned int slot)
{
	struct slot *request = &load->slots[slot];
	uint64_t sectors = load->options->block / SECTOR, sector = request->block * sectors, stamp;
	uint8_t status = load->memory->base[slot_address(load, slot) + 4096 + 16];
	struct result *result = load->result;

	if (status != VIRTIO_BLK_S_OK)
		fail("sector %lu: a %s ended with status %u", sector,
		     request->write ? "write" : "read", status);
	load->in_flight--;
	load->busy[request->block] = 0;
	if (load->record)
		histogram_add(&result->latency, now_ns() - request->began);
	if (request->write) {
		load->stamps[request->block] = request->stamp;
		result->written++;
		return;
	}
	stamp = data_check(load->memory->base + data_address(load, slot), sector, sectors,
			   load->options->sectors_only);
	if (!load->stamps[request->block]) {
		load->stamps[request->block] = stamp;
		result->learned++;
	} else if (load->stamps[request->block] != stamp) {
		fail("sector %lu: stamp 0x%lx, but 0x%lx was written", sector, stamp,
		     load->stamps[request->block]);
	}
	result->read++;
	result->verified++;
}

// Take what is finished and put something new in its place while `more` says so.
static void turn(struct load *load, bool more)
{
	bool progress = false;
	int slot;

	while ((slot = ring_take(load->ring, NULL)) >= 0) {
		progress = true;
		finish(load, (unsigned int)slot);
		if (more)
			submit(load, (unsigned int)slot);
	}
	ring_kick(load->ring);
	if (progress || ring_arm(load->ring, 0) || !load->in_flight)
		return;
	if (!ring_wait(load->ring, WAIT_MS))
		fail("the back end has %u requests and did nothing for %d s", load->in_flight,
		     WAIT_MS / 1000);
}

static uint64_t own_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

static uint64_t done(const struct load *load) { return load->result->read + load->result->written; }

static void fill_queue(struct load *load, uint64_t limit)
{
	for (unsigned int i = 0; i < load->options->depth && i < limit; i++)
		submit(load, i);
	ring_kick(load->ring);
}

// From the end of the warm-up to the last instant at which `depth` requests are on the way.
static void measure(struct load *load)
{
	const struct options *options = load->options;
	struct result *result = load->result;
	uint64_t began = now_ns(), warm = began + (uint64_t)(options->seconds * WARM_UP * 1e9);
	uint64_t end = warm + (uint64_t)(options->seconds * 1e9), count = 0;
	struct cost cost;

	cost_open(&cost, options->pid);
	fill_queue(load, UINT64_MAX);
	for (;;) {
		uint64_t now = now_ns();

		if (!load->record && now >= warm) {
			load->record = true;
			load->ring->kicks = load->ring->calls = 0;
			count = done(load);
			result->backend_ns = cost_ns(&cost);
			result->own_ns = own_ns();
			began = now_ns();
		}
		if (load->record &&
		    (options->requests ? done(load) - count >= options->requests : now >= end))
			break;
		turn(load, true);
	}
	result->elapsed_ns = now_ns() - began;
	result->backend_ns = cost_ns(&cost) - result->backend_ns;
	result->own_ns = own_ns() - result->own_ns;
	result->requests = done(load) - count;
	load->record = false;
	while (load->in_flight)
		turn(load, false);
}

// Read what was written once more, in order: what a back end mixed up after it answered.
static void read_back(struct load *load)
{
	uint64_t goal = load->options->readback < load->blocks ? load->options->readback
							       : load->blocks;
	uint64_t began = load->result->read;

	load->readback = true;
	load->next = 0;
	fill_queue(load, goal);
	while (load->in_flight)
		turn(load, load->next < goal);
	if (load->result->read - began < goal)
		fail("only %lu of %lu blocks were read again", load->result->read - began, goal);
}

void load_run(const struct options *options, uint64_t capacity, struct guest_memory *memory,
	      struct ring *ring, struct result *result)
{
	uint64_t span = capacity * SECTOR;
	struct load *load = calloc(1, sizeof(*load));

	if (options->span && options->span < span)
		span = options->span;
	*load = (struct load){.options = options, .memory = memory, .ring = ring, .result = result};
	load->random = options->seed * 0x9e3779b97f4a7c15ull | 1;
	load->blocks = span / options->block;
	if (load->blocks < 2 * options->depth)
		fail("the disk has %lu blocks of %lu bytes, too few for depth %u", load->blocks,
		     options->block, options->depth);
	load->stamps = calloc(load->blocks, sizeof(*load->stamps));
	load->busy = calloc(load->blocks, 1);
	load->area = ring->desc_addr + ring_bytes(ring->size);
	memset(result, 0, sizeof(*result));
	measure(load);
	if (result->written && options->readback)
		read_back(load);
	free(load->stamps);
	free(load->busy);
	free(load);
}

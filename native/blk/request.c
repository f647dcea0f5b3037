// Requests as the driver wrote them: every field is checked here, nothing is done here.
#include "blk/blk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <linux/virtio_blk.h>

#include "include/clock.h"

#define SLOW_ROUND_NS 5000000ull
#define AVOID_INLINE 64
// How often a busy queue looks whether the image is still as long as it was.
#define LOOK_NS 100000000ull
// The driver is told after so much was copied on this thread: it can go on meanwhile.
#define INLINE_BYTES (128u * 1024)

_Static_assert(sizeof(struct sv_blk_segment) * SV_BLK_MAX_SEGMENTS <=
		       2 * SV_BLK_MAX_SEGMENTS * sizeof(struct iovec),
	       "segments fit before the iovecs of written zeroes");

static size_t queue_bytes(const struct sv_blk_queue *queue)
{
	return queue->request_bytes + queue->iov_bytes +
	       queue->done_size * sizeof(struct sv_blk_done);
}

int sv_blk_init(struct sv_blk_queue *queue, struct sv_disk *disk, struct sv_virtq *vq,
		struct sv_engine *engine, struct sv_blk_counters *counters, unsigned int size)
{
	memset(queue, 0, sizeof(*queue));
	queue->disk = disk;
	queue->vq = vq;
	queue->engine = engine;
	queue->counters = counters;
	queue->request_bytes = size * sizeof(struct sv_blk_request);
	queue->iov_bytes = size * SV_BLK_IOVS * sizeof(struct iovec);
	queue->done_size = size;
	// Mapped, not allocated: pages of heads that are never used cost nothing.
	queue->requests = mmap(NULL, queue_bytes(queue),
			       PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			       -1, 0);
	if (queue->requests == MAP_FAILED)
		return -errno;
	queue->iovs = (struct iovec *)(queue->requests + size);
	queue->done = (struct sv_blk_done *)(queue->iovs + size * SV_BLK_IOVS);
	return 0;
}

void sv_blk_deinit(struct sv_blk_queue *queue)
{
	munmap(queue->requests, queue_bytes(queue));
}

// Copy `size` bytes at `offset` of the readable part; false if it is shorter.
static bool copy_out(const struct sv_chain *chain, uint64_t offset, void *to, size_t size)
{
	uint8_t *at = to;

	for (unsigned int i = 0; i < chain->out_count && size; i++) {
		const struct iovec *iov = &chain->iov[i];
		size_t part;

		if (offset >= iov->iov_len) {
			offset -= iov->iov_len;
			continue;
		}
		part = iov->iov_len - offset < size ? iov->iov_len - offset : size;
		memcpy(at, (uint8_t *)iov->iov_base + offset, part);
		at += part;
		size -= part;
		offset = 0;
	}
	return !size;
}

// The request's own list of `bytes` bytes at `offset` of `count` buffers; false: too many.
static bool take_data(struct sv_blk_request *request, const struct iovec *iov, unsigned int count,
		      uint64_t offset, uint64_t bytes)
{
	struct iovec *to = request->queue->iovs + request->head * (size_t)SV_BLK_IOVS;
	uint32_t used = 0;

	request->data = to;
	for (unsigned int i = 0; i < count && bytes; i++) {
		uint64_t part;

		if (offset >= iov[i].iov_len) {
			offset -= iov[i].iov_len;
			continue;
		}
		part = iov[i].iov_len - offset < bytes ? iov[i].iov_len - offset : bytes;
		if (used == SV_BLK_IOVS)
			return false;
		to[used++] = (struct iovec){(uint8_t *)iov[i].iov_base + offset, part};
		bytes -= part;
		offset = 0;
	}
	request->data_count = used;
	return true;
}

static bool in_range(const struct sv_disk *disk, uint64_t sector, uint64_t bytes)
{
	uint64_t capacity = __atomic_load_n(&disk->capacity, __ATOMIC_RELAXED);
	uint64_t sectors = bytes / SV_BLK_SECTOR;

	return sector <= capacity && sectors <= capacity - sector;
}

// IN and OUT: whole sectors inside the disk. Returns a status; OK: it may start.
static uint8_t check_data(struct sv_blk_request *request, uint64_t sector, uint64_t bytes)
{
	const struct sv_disk *disk = request->queue->disk;

	if (bytes % SV_BLK_SECTOR || !in_range(disk, sector, bytes))
		return VIRTIO_BLK_S_IOERR;
	if (request->type == SV_BLK_WRITE && disk->readonly)
		return VIRTIO_BLK_S_IOERR;
	request->offset = sector * SV_BLK_SECTOR;
	request->left = bytes;
	request->bytes = bytes;
	return VIRTIO_BLK_S_OK;
}

// DISCARD and WRITE_ZEROES carry an array of ranges (5.2.6).
static uint8_t check_segments(struct sv_blk_request *request, const struct sv_chain *chain)
{
	const struct sv_disk *disk = request->queue->disk;
	struct sv_blk_segment *segments = sv_blk_segments(request);
	uint64_t bytes = chain->out_bytes - sizeof(struct virtio_blk_outhdr);
	uint64_t count = bytes / sizeof(struct virtio_blk_discard_write_zeroes);

	if (disk->readonly)
		return VIRTIO_BLK_S_IOERR;
	if (!count || bytes % sizeof(struct virtio_blk_discard_write_zeroes) ||
	    count > SV_BLK_MAX_SEGMENTS)
		return VIRTIO_BLK_S_IOERR;
	for (uint32_t i = 0; i < count; i++) {
		struct virtio_blk_discard_write_zeroes range;

		copy_out(chain, sizeof(struct virtio_blk_outhdr) + i * sizeof(range), &range,
			 sizeof(range));
		// 5.2.6.2: an unknown flag, or unmap in a discard, is not supported.
		if (range.flags & ~VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
			return VIRTIO_BLK_S_UNSUPP;
		if (request->type == SV_BLK_DISCARD && range.flags)
			return VIRTIO_BLK_S_UNSUPP;
		if (range.num_sectors > SV_BLK_MAX_SECTORS ||
		    !in_range(disk, range.sector, (uint64_t)range.num_sectors * SV_BLK_SECTOR))
			return VIRTIO_BLK_S_IOERR;
		request->bytes += (uint64_t)range.num_sectors * SV_BLK_SECTOR;
		segments[i] = (struct sv_blk_segment){
			.offset = range.sector * SV_BLK_SECTOR,
			.length = (uint64_t)range.num_sectors * SV_BLK_SECTOR,
			.unmap = range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
		};
	}
	request->segment_next = 0;
	request->segment_count = (uint32_t)count;
	return VIRTIO_BLK_S_OK;
}

static void answer_id(struct sv_blk_request *request, uint64_t room)
{
	const uint8_t *id = request->queue->disk->id;
	uint64_t bytes = room < SV_BLK_ID_BYTES ? room : SV_BLK_ID_BYTES;
	uint64_t at = 0;

	for (uint32_t i = 0; i < request->data_count && at < bytes; i++) {
		const struct iovec *iov = &request->data[i];
		uint64_t part = iov->iov_len < bytes - at ? iov->iov_len : bytes - at;

		memcpy(iov->iov_base, id + at, part);
		at += part;
	}
	sv_blk_finish(request, VIRTIO_BLK_S_OK, (uint32_t)(bytes == room ? bytes + 1 : bytes));
}

static uint8_t classify(uint32_t type)
{
	switch (type) {
	case VIRTIO_BLK_T_IN:
		return SV_BLK_READ;
	case VIRTIO_BLK_T_OUT:
		return SV_BLK_WRITE;
	case VIRTIO_BLK_T_FLUSH:
		return SV_BLK_FLUSH;
	case VIRTIO_BLK_T_DISCARD:
		return SV_BLK_DISCARD;
	case VIRTIO_BLK_T_WRITE_ZEROES:
		return SV_BLK_ZERO;
	default:
		return SV_BLK_OTHER;
	}
}

static bool is_limited(const struct sv_blk_request *request)
{
	return request->type != SV_BLK_FLUSH && request->type != SV_BLK_OTHER &&
	       sv_throttle_active(&request->queue->disk->throttle);
}

// Nanoseconds that the limits make it wait; 0: go.
static uint64_t take_tokens(struct sv_blk_request *request, uint64_t now)
{
	struct sv_blk_queue *queue = request->queue;
	bool moves = request->type == SV_BLK_READ || request->type == SV_BLK_WRITE;

	return sv_throttle_take(&queue->disk->throttle, request->type != SV_BLK_READ,
				moves ? request->bytes : 0, now, queue->draining);
}

static void start_limited(struct sv_blk_request *request)
{
	struct sv_blk_queue *queue = request->queue;
	uint64_t now = sv_now_ns();
	uint64_t wait = take_tokens(request, now);

	if (!wait) {
		sv_blk_start(request, true);
		return;
	}
	queue->counters->throttled++;
	queue->held = request;
	queue->held_until = now + wait;
	queue->busy++;
}

bool sv_blk_release(struct sv_blk_queue *queue)
{
	struct sv_blk_request *request = queue->held;
	uint64_t now;
	uint64_t wait;

	if (!request)
		return false;
	now = sv_now_ns();
	wait = take_tokens(request, now);
	if (wait) {
		queue->held_until = now + wait;
		return false;
	}
	queue->held = NULL;
	queue->busy--;
	sv_blk_start(request, true);
	return true;
}

// Check everything that the header and the shape of the chain say, then start or answer.
static void handle(struct sv_blk_request *request, const struct sv_chain *chain, bool lonely)
{
	const struct iovec *in = &chain->iov[chain->out_count];
	uint64_t room = chain->in_bytes - 1; // for data; the status byte is the last one
	struct virtio_blk_outhdr header;
	uint8_t status = VIRTIO_BLK_S_OK;
	bool fits = true;

	if (!copy_out(chain, 0, &header, sizeof(header))) {
		request->type = SV_BLK_OTHER;
		sv_blk_finish(request, VIRTIO_BLK_S_IOERR, room ? 0 : 1);
		return;
	}
	request->type = classify(header.type);
	switch (request->type) {
	case SV_BLK_READ:
		status = check_data(request, header.sector, room);
		fits = take_data(request, in, chain->in_count, 0, room);
		break;
	case SV_BLK_WRITE:
		status = check_data(request, header.sector, chain->out_bytes - sizeof(header));
		fits = take_data(request, chain->iov, chain->out_count, sizeof(header),
				 chain->out_bytes - sizeof(header));
		break;
	case SV_BLK_DISCARD:
	case SV_BLK_ZERO:
		status = check_segments(request, chain);
		break;
	case SV_BLK_FLUSH:
		break;
	default:
		if (header.type != VIRTIO_BLK_T_GET_ID) {
			status = VIRTIO_BLK_S_UNSUPP;
			break;
		}
		if (take_data(request, in, chain->in_count, 0, room)) {
			answer_id(request, room);
			return;
		}
		fits = false;
	}
	if (status == VIRTIO_BLK_S_OK && !fits)
		status = VIRTIO_BLK_S_IOERR;
	if (status != VIRTIO_BLK_S_OK)
		sv_blk_finish(request, status, room ? 0 : 1);
	else if (is_limited(request))
		start_limited(request);
	else
		sv_blk_start(request, lonely);
}

// A round that took longer than its bytes explain was throttled by the kernel in a write; so
// many writes that follow go to the engine, so that reads behind them get through.
static void watch_throttling(struct sv_blk_queue *queue, uint64_t start)
{
	if (queue->inline_bytes && sv_now_ns() - start > SLOW_ROUND_NS + queue->inline_bytes)
		queue->avoid_inline = AVOID_INLINE;
}

bool sv_blk_serve(struct sv_blk_queue *queue, unsigned int budget)
{
	struct sv_chain *chain = &queue->chain;
	uint64_t start = sv_now_ns();
	bool progress = false;

	if (start >= queue->look_at) {
		queue->look_at = start + LOOK_NS;
		sv_blk_measure(queue->disk);
	}
	// A deferred write waits for those before it: nothing new until it is done. One of another
	// queue waits for this queue's.
	while (budget-- && !sv_blk_blocked(queue) && queue->inline_bytes < INLINE_BYTES) {
		bool lonely = sv_virtq_pending(queue->vq) <= 2 && !queue->engine->unsubmitted;
		struct sv_blk_request *request;
		struct iovec *last;

		if (sv_virtq_pop(queue->vq, chain) <= 0)
			break;
		progress = true;
		if (!chain->in_bytes) {
			// No byte to write a status to: only a broken driver makes that.
			queue->vq->broken = true;
			queue->vq->reason = "a request without a status byte";
			sv_virtq_push(queue->vq, chain->head, 0);
			break;
		}
		request = &queue->requests[chain->head];
		memset(request, 0, sizeof(*request));
		request->queue = queue;
		request->head = chain->head;
		request->start = start;
		request->in_bytes = chain->in_bytes;
		last = &chain->iov[chain->out_count + chain->in_count - 1];
		request->status = (uint8_t *)last->iov_base + last->iov_len - 1;
		handle(request, chain, lonely);
	}
	watch_throttling(queue, start);
	return progress;
}

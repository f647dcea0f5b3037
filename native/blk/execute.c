// Doing what request.c found right: transfers with all that can come back short or refused, and
// durability.
#include "blk/execute.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#include <linux/virtio_blk.h>

#include "include/clock.h"

#define RING_READ_BYTES (64u * 1024)
#define MAX_RETRIES 16

// By SV_BLK_READ to SV_BLK_ZERO: discard and write zeroes are both "unmap".
static const uint8_t timed_as[] = {0, 1, 2, 3, 3};

static void count_timed(struct sv_blk_request *request, uint8_t status)
{
	struct sv_blk_queue *queue = request->queue;
	uint8_t timed = timed_as[request->type];

	if (status != VIRTIO_BLK_S_OK && !request->failed) {
		// The driver's own mistake: not worth a latency.
		queue->counters->invalid[timed]++;
		return;
	}
	queue->counters->failed[timed] += request->failed;
	// A driver that gets no calls may reuse heads faster than we publish.
	if (queue->done_count == queue->done_size)
		sv_blk_note_latencies(queue);
	queue->done[queue->done_count++] = (struct sv_blk_done){request->start, timed};
}

void sv_blk_note_latencies(struct sv_blk_queue *queue)
{
	struct sv_blk_counters *counters = queue->counters;
	// One look at the clock for all of them: it costs as much as all the rest.
	uint64_t now = queue->done_count ? sv_now_ns() : 0;

	for (unsigned int i = 0; i < queue->done_count; i++) {
		struct sv_blk_done *done = &queue->done[i];
		uint64_t ns = now - done->start;
		// 2^11 ns and more: how many bits more than 11.
		unsigned int bucket = 64 - (unsigned int)__builtin_clzll((ns >> 11) | 1);

		bucket -= ns < 2048;
		counters->total_ns[done->timed] += ns;
		counters->latency[done->timed][MIN(bucket, SV_BLK_BUCKETS - 1u)]++;
	}
	queue->done_count = 0;
}

static void count_request(struct sv_blk_request *request, uint8_t status)
{
	struct sv_blk_counters *counters = request->queue->counters;

	if (status != VIRTIO_BLK_S_OK)
		counters->errors++;
	if (request->type < SV_BLK_OTHER)
		count_timed(request, status);
	switch (request->type) {
	case SV_BLK_READ:
		counters->reads++;
		counters->read_bytes += status == VIRTIO_BLK_S_OK ? request->bytes : 0;
		break;
	case SV_BLK_WRITE:
		counters->writes++;
		counters->written_bytes += status == VIRTIO_BLK_S_OK ? request->bytes : 0;
		break;
	case SV_BLK_FLUSH:
		counters->flushes++;
		break;
	case SV_BLK_DISCARD:
		counters->discards++;
		counters->unmapped_bytes += status == VIRTIO_BLK_S_OK ? request->bytes : 0;
		break;
	case SV_BLK_ZERO:
		counters->write_zeroes++;
		counters->unmapped_bytes += status == VIRTIO_BLK_S_OK ? request->bytes : 0;
		break;
	default:
		counters->others++;
	}
}

void sv_blk_finish(struct sv_blk_request *request, uint8_t status, uint32_t written)
{
	struct sv_blk_queue *queue = request->queue;

	free(request->bounce);
	request->bounce = NULL;
	if (request->holds_partial) {
		request->holds_partial = false;
		if (--queue->writes == 0)
			pthread_rwlock_unlock(&queue->disk->partial);
	}
	*(volatile uint8_t *)request->status = status;
	count_request(request, status);
	sv_virtq_push(queue->vq, request->head, written);
}

// `written`: bytes from the first writable one on (2.7.8.2), none if the status alone was.
void sv_blk_end(struct sv_blk_request *request, uint8_t status)
{
	uint64_t bytes = request->in_bytes;

	if (status != VIRTIO_BLK_S_OK || request->type != SV_BLK_READ)
		bytes = bytes == 1 ? 1 : 0;
	sv_blk_finish(request, status, (uint32_t)MIN(bytes, UINT32_MAX));
}

void sv_blk_fail(struct sv_blk_request *request, int error)
{
	struct sv_blk_failures *failures = &request->queue->disk->failures;

	request->failed = true;
	if (request->type < SV_BLK_OTHER) {
		__atomic_store_n(&failures->error[request->type], -error, __ATOMIC_RELAXED);
		__atomic_fetch_add(&failures->count[request->type], 1, __ATOMIC_RELEASE);
		if (failures->event_fd >= 0)
			eventfd_write(failures->event_fd, 1);
	}
	sv_blk_end(request, VIRTIO_BLK_S_IOERR);
}

void sv_blk_submit(struct sv_blk_request *request)
{
	request->queue->busy++;
	sv_engine_submit(request->queue->engine, &request->io);
}

// All data is where it belongs: make it durable if the guest was promised that.
void sv_blk_transferred(struct sv_blk_request *request)
{
	struct sv_disk *disk = request->queue->disk;

	if (request->type == SV_BLK_READ || request->durable ||
	    __atomic_load_n(&disk->writeback, __ATOMIC_ACQUIRE)) {
		sv_blk_end(request, VIRTIO_BLK_S_OK);
		return;
	}
	request->syncing = true;
	request->io.op = SV_IO_FDATASYNC;
	sv_blk_submit(request);
}

// ---- data ---------------------------------------------------------------------------------

void sv_blk_advance(struct sv_blk_request *request, uint64_t bytes)
{
	request->offset += bytes;
	request->left -= bytes;
	while (bytes) {
		struct iovec *iov = request->data;
		uint64_t part = MIN(iov->iov_len, bytes);

		iov->iov_base = (uint8_t *)iov->iov_base + part;
		iov->iov_len -= part;
		bytes -= part;
		if (!iov->iov_len) {
			request->data++;
			request->data_count--;
		}
	}
}

// What a transfer gave. True: there is more to transfer.
static bool account(struct sv_blk_request *request, int result)
{
	struct sv_disk *disk = request->queue->disk;
	uint64_t bytes = (uint64_t)result;

	if (request->bouncing) {
		uint64_t skip = request->offset - request->io.offset;

		bytes = bytes > skip ? MIN(bytes - skip, request->left) : 0;
		if (request->type == SV_BLK_READ)
			sv_blk_copy_data(request, request->bounce + skip, bytes, true);
	}
	sv_blk_advance(request, bytes);
	if (!request->left) {
		if (request->zeroing)
			sv_blk_next_segment(request);
		else
			sv_blk_transferred(request);
		return false;
	}
	if (bytes)
		return true;
	// The end of the image. The rest of its last sector reads as zeroes; anything more is
	// missing: somebody made the image shorter.
	if (request->type == SV_BLK_READ && request->left < SV_BLK_SECTOR &&
	    request->offset + request->left ==
		    __atomic_load_n(&disk->capacity, __ATOMIC_RELAXED) * SV_BLK_SECTOR) {
		for (uint32_t i = 0; i < request->data_count; i++)
			memset(request->data[i].iov_base, 0, request->data[i].iov_len);
		sv_blk_end(request, VIRTIO_BLK_S_OK);
		return false;
	}
	sv_blk_measure(disk);
	sv_blk_fail(request, -ENODATA);
	return false;
}

// Try on this thread, where that is the cheapest way: writes into the page cache, and reads
// that it holds. True: io->result tells; false: the engine must do it.
static bool run_inline(struct sv_blk_request *request, bool lonely)
{
	struct sv_blk_queue *queue = request->queue;
	struct sv_disk *disk = queue->disk;
	struct sv_io *io = &request->io;

	if (disk->direct)
		return false;
	if (io->op == SV_IO_READ) {
		// Several small ones at once are cheaper through the ring, which enters once.
		if (disk->no_nowait || (!lonely && queue->engine->kind != SV_ENGINE_THREADS &&
					request->left < RING_READ_BYTES))
			return false;
		io->flags = RWF_NOWAIT;
		sv_io_run(io, disk->fd);
		io->flags = 0;
		if (io->result == -EOPNOTSUPP)
			disk->no_nowait = true;
		if (io->result == -EAGAIN || io->result == -EOPNOTSUPP)
			return false;
	} else {
		if (io->flags || request->zeroing)
			return false;
		if (queue->avoid_inline) {
			queue->avoid_inline--;
			return false;
		}
		sv_io_run(io, disk->fd);
	}
	queue->counters->inline_ops++;
	if (io->result > 0)
		queue->inline_bytes += (uint64_t)io->result;
	return true;
}

// Transfer what is left: on this thread as far as that goes, then by the engine.
void sv_blk_issue(struct sv_blk_request *request, bool lonely)
{
	struct sv_disk *disk = request->queue->disk;
	struct sv_io *io = &request->io;

	for (;;) {
		// All of them each time: what a bounce buffer holds is not where the last ones end.
		if (request->zeroing)
			sv_blk_refill_zeroes(request);
		request->bouncing = false;
		io->op = request->type == SV_BLK_READ ? SV_IO_READ : SV_IO_WRITE;
		io->flags = request->durable ? RWF_DSYNC : 0;
		io->offset = request->offset;
		io->iov = request->data;
		io->count = request->data_count;
		if (!sv_blk_is_aligned(request) && !sv_blk_bounce(request))
			return;
		if (!run_inline(request, lonely)) {
			sv_blk_submit(request);
			return;
		}
		if (io->result < 0) {
			if (io->result == -EINTR && request->retries++ < MAX_RETRIES)
				continue;
			sv_blk_fail(request, io->result);
			return;
		}
		if (!account(request, io->result))
			return;
		if (disk->direct)
			lonely = false;
	}
}

void sv_blk_start_write(struct sv_blk_request *request)
{
	struct sv_blk_queue *queue = request->queue;

	// Only where blocks are larger than sectors can a write touch what it doesn't replace.
	if (queue->disk->align <= SV_BLK_SECTOR)
		return;
	if (queue->writes++ == 0)
		pthread_rwlock_rdlock(&queue->disk->partial);
	request->holds_partial = true;
}

// ---- an image that somebody makes shorter ---------------------------------------------------

void sv_blk_measure(struct sv_disk *disk)
{
	struct stat st;
	uint64_t end = UINT64_MAX;

	// A block device answers for itself.
	if (disk->block_device || fstat(disk->fd, &st) < 0)
		return;
	if ((uint64_t)st.st_size < __atomic_load_n(&disk->size, __ATOMIC_RELAXED))
		end = (uint64_t)st.st_size;
	__atomic_store_n(&disk->end, end, __ATOMIC_RELAXED);
}

// Whether the request touches what is gone. A write there would make the file longer again,
// and what was cut off would read as zeroes.
static bool is_cut_off(struct sv_blk_request *request)
{
	struct sv_disk *disk = request->queue->disk;
	uint64_t last = request->offset + request->left;

	if (__atomic_load_n(&disk->end, __ATOMIC_RELAXED) == UINT64_MAX)
		return false;
	for (uint32_t i = 0; i < request->segment_count; i++) {
		struct sv_blk_segment *segment = &sv_blk_segments(request)[i];

		if (segment->offset + segment->length > last)
			last = segment->offset + segment->length;
	}
	sv_blk_measure(disk); // it may be back
	return last > __atomic_load_n(&disk->end, __ATOMIC_RELAXED);
}

// ---- start and completion ------------------------------------------------------------------

void sv_blk_start(struct sv_blk_request *request, bool lonely)
{
	struct sv_disk *disk = request->queue->disk;

	if (is_cut_off(request)) {
		sv_blk_fail(request, -ENODATA);
		return;
	}
	switch (request->type) {
	case SV_BLK_READ:
		if (!request->left)
			sv_blk_end(request, VIRTIO_BLK_S_OK);
		else
			sv_blk_issue(request, lonely);
		break;
	case SV_BLK_WRITE:
		if (!request->left) {
			sv_blk_end(request, VIRTIO_BLK_S_OK);
			break;
		}
		if (disk->detect_zeroes && sv_blk_is_zero(request->data, request->data_count)) {
			sv_blk_start_zeroing(request);
			break;
		}
		request->durable = !__atomic_load_n(&disk->writeback, __ATOMIC_ACQUIRE);
		sv_blk_start_write(request);
		sv_blk_issue(request, lonely);
		break;
	case SV_BLK_FLUSH:
		// Started now, it covers every write that has completed (5.2.6.2). Nothing was
		// ever written through a read-only descriptor.
		if (disk->readonly) {
			sv_blk_end(request, VIRTIO_BLK_S_OK);
			break;
		}
		request->io.op = SV_IO_FDATASYNC;
		sv_blk_submit(request);
		break;
	case SV_BLK_DISCARD:
		if (!disk->unmap) {
			sv_blk_end(request, VIRTIO_BLK_S_OK);
			break;
		}
		// fall through
	default:
		sv_blk_next_segment(request);
	}
}

static void complete(struct sv_blk_request *request)
{
	int result = request->io.result;

	request->queue->busy--;
	if ((result == -EINTR || result == -EAGAIN) && request->retries++ < MAX_RETRIES) {
		sv_blk_submit(request);
		return;
	}
	if (request->syncing || request->type == SV_BLK_FLUSH) {
		if (result < 0)
			sv_blk_fail(request, result);
		else
			sv_blk_end(request, VIRTIO_BLK_S_OK);
		return;
	}
	if (request->io.op == SV_IO_FALLOCATE || request->io.op == SV_IO_DISCARD) {
		sv_blk_segment_done(request, result);
		return;
	}
	if (result == -EOPNOTSUPP && request->durable) {
		// No RWF_DSYNC here: write, then sync.
		request->durable = false;
		sv_blk_issue(request, false);
		return;
	}
	if (result < 0)
		sv_blk_fail(request, result);
	else if (account(request, result))
		sv_blk_issue(request, false);
}

bool sv_blk_reap(struct sv_blk_queue *queue)
{
	bool progress = false;
	struct sv_io *io;

	while ((io = sv_engine_reap(queue->engine))) {
		progress = true;
		complete((struct sv_blk_request *)io); // io is its first member
	}
	while (queue->deferred && !queue->writes) {
		io = queue->deferred;
		queue->deferred = io->next;
		queue->busy--;
		sv_blk_write_partial((struct sv_blk_request *)io);
		progress = true;
	}
	return progress;
}

// Doing what request.c found right: transfers with all that can come back short or refused,
// read-modify-write where a block is larger than what was asked, and durability.
#include "blk/execute.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <linux/virtio_blk.h>

#define BOUNCE_BYTES (256u * 1024)
#define RING_READ_BYTES (64u * 1024)
#define MAX_RETRIES 16

static void count_request(struct sv_blk_request *request, uint8_t status)
{
	struct sv_blk_counters *counters = request->queue->counters;

	if (status != VIRTIO_BLK_S_OK)
		counters->errors++;
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
		break;
	case SV_BLK_ZERO:
		counters->write_zeroes++;
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

static void advance(struct sv_blk_request *request, uint64_t bytes)
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

// Copy between the bounce buffer and the guest's buffers, without moving on.
static void copy_data(struct sv_blk_request *request, uint8_t *bounce, uint64_t bytes, bool to_guest)
{
	for (uint32_t i = 0; i < request->data_count && bytes; i++) {
		uint64_t part = MIN(request->data[i].iov_len, bytes);

		if (to_guest)
			memcpy(request->data[i].iov_base, bounce, part);
		else
			memcpy(bounce, request->data[i].iov_base, part);
		bounce += part;
		bytes -= part;
	}
}

static bool is_aligned(const struct sv_blk_request *request)
{
	const struct sv_disk *disk = request->queue->disk;

	if (!disk->direct)
		return true;
	if ((request->offset | request->left) & (disk->align - 1))
		return false;
	for (uint32_t i = 0; i < request->data_count; i++) {
		if (((uintptr_t)request->data[i].iov_base & (disk->memory_align - 1)) ||
		    (request->data[i].iov_len & (disk->align - 1)))
			return false;
	}
	return true;
}

static uint8_t *get_bounce(struct sv_blk_request *request)
{
	struct sv_disk *disk = request->queue->disk;
	size_t align = disk->align > disk->memory_align ? disk->align : disk->memory_align;

	if (!request->bounce) {
		request->queue->counters->bounced++;
		if (posix_memalign(&request->bounce, align < sizeof(void *) ? sizeof(void *) : align,
				   BOUNCE_BYTES))
			request->bounce = NULL;
	}
	return request->bounce;
}

// The block-aligned range around what is left, as much as the bounce buffer holds.
static void aligned_range(struct sv_blk_request *request, uint64_t *start, uint64_t *length)
{
	uint64_t mask = request->queue->disk->align - 1;
	uint64_t end_at = (request->offset + request->left + mask) & ~mask;

	*start = request->offset & ~mask;
	*length = MIN(end_at - *start, BOUNCE_BYTES);
}

// Write less than whole blocks: read them, put the new bytes in, write them back. Exclusive:
// no other write of any queue is on its way meanwhile, so none can be undone.
static void write_partial(struct sv_blk_request *request)
{
	struct sv_disk *disk = request->queue->disk;
	int ret = 0;

	// A queue whose writes never run out would hold it for ever: it takes no new ones now.
	__atomic_fetch_add(&disk->partial_waiting, 1, __ATOMIC_RELAXED);
	pthread_rwlock_wrlock(&disk->partial);
	__atomic_fetch_sub(&disk->partial_waiting, 1, __ATOMIC_RELAXED);
	while (request->left && ret >= 0) {
		struct iovec iov = {.iov_base = get_bounce(request)};
		struct sv_io io = {.iov = &iov, .count = 1};
		uint64_t start, length, skip, part;

		if (!iov.iov_base) {
			ret = -ENOMEM;
			break;
		}
		if (request->zeroing && !request->data_count)
			sv_blk_refill_zeroes(request);
		aligned_range(request, &start, &length);
		skip = request->offset - start;
		part = MIN(length - skip, request->left);
		if (request->zeroing)
			part = MIN(part, ZEROES_CHUNK);
		iov.iov_len = length;
		io.offset = start;
		// Beyond the end of the image there is nothing to keep but zeroes.
		memset(iov.iov_base, 0, length);
		io.op = SV_IO_READ;
		io.flags = 0;
		ret = sv_io_run(&io, disk->fd);
		if (ret < 0)
			break;
		copy_data(request, (uint8_t *)iov.iov_base + skip, part, false);
		io.op = SV_IO_WRITE;
		io.flags = request->durable ? RWF_DSYNC : 0;
		ret = sv_io_run(&io, disk->fd);
		if (ret >= 0 && (uint64_t)ret < length)
			ret = -EIO;
		if (ret >= 0)
			advance(request, part);
	}
	pthread_rwlock_unlock(&disk->partial);
	if (ret < 0)
		sv_blk_end(request, VIRTIO_BLK_S_IOERR);
	else if (request->zeroing)
		sv_blk_next_segment(request);
	else
		sv_blk_transferred(request);
}

// Set io up to go through the bounce buffer. False: it was dealt with otherwise.
static bool bounce(struct sv_blk_request *request)
{
	struct sv_disk *disk = request->queue->disk;
	uint64_t start, length;

	if (!get_bounce(request)) {
		sv_blk_end(request, VIRTIO_BLK_S_IOERR);
		return false;
	}
	aligned_range(request, &start, &length);
	if (request->type != SV_BLK_READ) {
		uint64_t whole = MIN(request->left, BOUNCE_BYTES) & ~(uint64_t)(disk->align - 1);

		if (start != request->offset || !whole) {
			// Its own place in the queue's writes given up, wait for the others.
			if (request->holds_partial) {
				request->holds_partial = false;
				if (--request->queue->writes == 0)
					pthread_rwlock_unlock(&disk->partial);
			}
			if (request->queue->writes) {
				request->io.next = request->queue->deferred;
				request->queue->deferred = &request->io;
				request->queue->busy++;
			} else {
				write_partial(request);
			}
			return false;
		}
		length = whole;
		copy_data(request, request->bounce, length, false);
	}
	request->bouncing = true;
	request->bounce_iov = (struct iovec){request->bounce, length};
	request->io.iov = &request->bounce_iov;
	request->io.count = 1;
	request->io.offset = start;
	return true;
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
			copy_data(request, request->bounce + skip, bytes, true);
	}
	advance(request, bytes);
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
	    request->offset + request->left == disk->capacity * SV_BLK_SECTOR) {
		for (uint32_t i = 0; i < request->data_count; i++)
			memset(request->data[i].iov_base, 0, request->data[i].iov_len);
		sv_blk_end(request, VIRTIO_BLK_S_OK);
		return false;
	}
	sv_blk_end(request, VIRTIO_BLK_S_IOERR);
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
		if (disk->no_nowait || (!lonely && queue->engine->kind == SV_ENGINE_URING &&
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
		if (request->zeroing && !request->data_count)
			sv_blk_refill_zeroes(request);
		request->bouncing = false;
		io->op = request->type == SV_BLK_READ ? SV_IO_READ : SV_IO_WRITE;
		io->flags = request->durable ? RWF_DSYNC : 0;
		io->offset = request->offset;
		io->iov = request->data;
		io->count = request->data_count;
		if (!is_aligned(request) && !bounce(request))
			return;
		if (!run_inline(request, lonely)) {
			sv_blk_submit(request);
			return;
		}
		if (io->result < 0) {
			if (io->result == -EINTR && request->retries++ < MAX_RETRIES)
				continue;
			sv_blk_end(request, VIRTIO_BLK_S_IOERR);
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

// ---- start and completion ------------------------------------------------------------------

void sv_blk_start(struct sv_blk_request *request, bool lonely)
{
	struct sv_disk *disk = request->queue->disk;

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
		sv_blk_end(request, result < 0 ? VIRTIO_BLK_S_IOERR : VIRTIO_BLK_S_OK);
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
		sv_blk_end(request, VIRTIO_BLK_S_IOERR);
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
		write_partial((struct sv_blk_request *)io);
		progress = true;
	}
	return progress;
}

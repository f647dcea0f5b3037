// O_DIRECT transfers that aren't aligned go through a copy that is; where a block is larger than
// what is written, it is read, changed and written back.
#include "blk/execute.h"

#include <stdlib.h>
#include <string.h>

#include <linux/virtio_blk.h>

#define BOUNCE_BYTES (256u * 1024)

_Static_assert(BOUNCE_BYTES <= ZEROES_CHUNK, "there are zeroes for all of the buffer");

// Copy between the bounce buffer and the guest's buffers, without moving on.
void sv_blk_copy_data(struct sv_blk_request *request, uint8_t *bounce, uint64_t bytes, bool to_guest)
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

bool sv_blk_is_aligned(const struct sv_blk_request *request)
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

// How many bytes of the block-aligned range the image has: those after it are zeroes.
static uint64_t present(struct sv_disk *disk, uint64_t start, uint64_t length)
{
	uint64_t size = __atomic_load_n(&disk->size, __ATOMIC_RELAXED);

	return size > start ? MIN(length, size - start) : 0;
}

// Write less than whole blocks: read them, put the new bytes in, write them back. Exclusive:
// no other write of any queue is on its way meanwhile, so none can be undone.
void sv_blk_write_partial(struct sv_blk_request *request)
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
		if (request->zeroing)
			sv_blk_refill_zeroes(request);
		aligned_range(request, &start, &length);
		skip = request->offset - start;
		part = MIN(length - skip, request->left);
		iov.iov_len = length;
		io.offset = start;
		// Beyond the end of the image there is nothing to keep but zeroes.
		memset(iov.iov_base, 0, length);
		io.op = SV_IO_READ;
		io.flags = 0;
		ret = sv_io_run(&io, disk->fd);
		// What was not read although it should be there must not become zeroes.
		if (ret >= 0 && (uint64_t)ret < present(disk, start, length)) {
			sv_blk_measure(disk);
			ret = -ENODATA;
		}
		if (ret < 0)
			break;
		sv_blk_copy_data(request, (uint8_t *)iov.iov_base + skip, part, false);
		io.op = SV_IO_WRITE;
		io.flags = request->durable ? RWF_DSYNC : 0;
		ret = sv_io_run(&io, disk->fd);
		if (ret >= 0 && (uint64_t)ret < length)
			ret = -EIO;
		if (ret >= 0)
			sv_blk_advance(request, part);
	}
	pthread_rwlock_unlock(&disk->partial);
	if (ret < 0)
		sv_blk_fail(request, ret);
	else if (request->zeroing)
		sv_blk_next_segment(request);
	else
		sv_blk_transferred(request);
}

// Set io up to go through the bounce buffer. False: it was dealt with otherwise.
bool sv_blk_bounce(struct sv_blk_request *request)
{
	struct sv_disk *disk = request->queue->disk;
	uint64_t start, length;

	if (!get_bounce(request)) {
		sv_blk_fail(request, -ENOMEM);
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
				sv_blk_write_partial(request);
			}
			return false;
		}
		length = whole;
		sv_blk_copy_data(request, request->bounce, length, false);
	}
	request->bouncing = true;
	request->bounce_iov = (struct iovec){request->bounce, length};
	request->io.iov = &request->bounce_iov;
	request->io.count = 1;
	request->io.offset = start;
	return true;
}

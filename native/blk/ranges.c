// DISCARD and WRITE_ZEROES: range by range, by what the image can do best.
#include "blk/execute.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include <linux/falloc.h>
#include <linux/virtio_blk.h>

#define ZEROES_BYTES (64u * 1024)

static uint8_t zeroes[ZEROES_BYTES] __attribute__((aligned(4096)));

void sv_blk_refill_zeroes(struct sv_blk_request *request)
{
	struct iovec *iov = sv_blk_zero_iov(request);
	uint64_t bytes = MIN(request->left, ZEROES_CHUNK);

	request->data = iov;
	request->data_count = 0;
	while (bytes) {
		uint64_t part = MIN(bytes, ZEROES_BYTES);

		iov[request->data_count++] = (struct iovec){zeroes, part};
		bytes -= part;
	}
}

static void write_zeroes(struct sv_blk_request *request)
{
	request->zeroing = true;
	sv_blk_issue(request, false);
}

// The range of the segment under way, not yet done, is in offset and left.
void sv_blk_next_segment(struct sv_blk_request *request)
{
	struct sv_disk *disk = request->queue->disk;
	struct sv_blk_segment segment;
	bool unmap;

	do {
		if (request->segment_next == request->segment_count) {
			sv_blk_transferred(request);
			return;
		}
		segment = sv_blk_segments(request)[request->segment_next++];
	} while (!segment.length);
	if (!request->holds_partial)
		sv_blk_start_write(request);
	request->offset = segment.offset;
	request->left = segment.length;
	request->zeroing = false;
	request->io.offset = segment.offset;
	request->io.length = segment.length;
	request->io.op = SV_IO_FALLOCATE;
	unmap = disk->unmap && segment.unmap;
	if (request->type == SV_BLK_DISCARD) {
		request->io.op = disk->block_device ? SV_IO_DISCARD : SV_IO_FALLOCATE;
		request->io.flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	} else if (unmap) {
		request->io.flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	} else if (!disk->no_zero_range) {
		request->io.flags = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
	} else {
		write_zeroes(request);
		return;
	}
	sv_blk_submit(request);
}

static bool is_zero(const uint8_t *at, uint64_t bytes)
{
	uint64_t some = 0;

	// Most data that isn't zero shows that early; then compared with itself, shifted.
	for (uint64_t i = 0; i < MIN(bytes, 16); i++)
		some |= at[i];
	return !some && (bytes <= 16 || !memcmp(at, at + 16, bytes - 16));
}

bool sv_blk_is_zero(const struct iovec *iov, uint32_t count)
{
	// The last bytes first: what starts with zeroes seldom ends with them.
	for (uint32_t i = count; i--;) {
		const uint8_t *at = iov[i].iov_base;
		uint64_t tail = MIN(iov[i].iov_len, 16);

		if (!is_zero(at + iov[i].iov_len - tail, tail) || !is_zero(at, iov[i].iov_len))
			return false;
	}
	return true;
}

void sv_blk_start_zeroing(struct sv_blk_request *request)
{
	struct sv_blk_segment *segment = sv_blk_segments(request);

	// In the place of the list of buffers, which nobody needs any more.
	*segment = (struct sv_blk_segment){
		.offset = request->offset,
		.length = request->left,
		.unmap = request->queue->disk->detect_unmap,
	};
	request->segment_next = 0;
	request->segment_count = 1;
	sv_blk_next_segment(request);
}

static bool not_supported(int result)
{
	return result == -EOPNOTSUPP || result == -ENOSYS || result == -ENOTTY || result == -EINVAL;
}

void sv_blk_segment_done(struct sv_blk_request *request, int result)
{
	struct sv_disk *disk = request->queue->disk;

	if (not_supported(result)) {
		if (request->type == SV_BLK_DISCARD) {
			result = 0; // a hint that the image can't take
		} else {
			if (result != -EINVAL && request->io.flags & FALLOC_FL_ZERO_RANGE)
				disk->no_zero_range = true;
			write_zeroes(request);
			return;
		}
	}
	if (result < 0)
		sv_blk_fail(request, result);
	else
		sv_blk_next_segment(request);
}


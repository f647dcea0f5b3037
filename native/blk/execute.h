// Between execute.c (transfers, durability, the end of a request), bounce.c (unaligned
// transfers) and ranges.c (discard and write zeroes).
#pragma once

#include "blk/blk.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))

// Zeroes that are written at once, where the image can't make them itself.
#define ZEROES_CHUNK (1024u * 1024)

// Give `io` to the engine.
void sv_blk_submit(struct sv_blk_request *request);

// Transfer what is left: on this thread as far as that goes, then by the engine.
void sv_blk_issue(struct sv_blk_request *request, bool lonely);

// `bytes` were transferred: go on behind them.
void sv_blk_advance(struct sv_blk_request *request, uint64_t bytes);

// Copy between a bounce buffer and the guest's buffers, without moving on.
void sv_blk_copy_data(struct sv_blk_request *request, uint8_t *bounce, uint64_t bytes,
		      bool to_guest);

// Whether what is left can go to the image as it is.
bool sv_blk_is_aligned(const struct sv_blk_request *request);

// Set io up to go through an aligned copy. False: the request was dealt with otherwise.
bool sv_blk_bounce(struct sv_blk_request *request);

// Write less than whole blocks. No write of this queue is on its way.
void sv_blk_write_partial(struct sv_blk_request *request);

// Before the first byte is changed; see sv_disk.partial.
void sv_blk_start_write(struct sv_blk_request *request);

// Everything was transferred: make it durable if the guest was promised that, then end.
void sv_blk_transferred(struct sv_blk_request *request);

// Give the request back with a VIRTIO_BLK_S_* status.
void sv_blk_end(struct sv_blk_request *request, uint8_t status);

// Start the next range of a DISCARD or WRITE_ZEROES, or end.
void sv_blk_next_segment(struct sv_blk_request *request);

// Whether all bytes of these buffers are zero now. The driver may change them while we look:
// then either answer is right.
bool sv_blk_is_zero(const struct iovec *iov, uint32_t count);

// Do a WRITE of nothing but zeroes as a WRITE_ZEROES of the same range.
void sv_blk_start_zeroing(struct sv_blk_request *request);

// What fallocate or BLKDISCARD said of the range under way.
void sv_blk_segment_done(struct sv_blk_request *request, int result);

// As many zeroes as are left to write, or one chunk, as data of the request.
void sv_blk_refill_zeroes(struct sv_blk_request *request);

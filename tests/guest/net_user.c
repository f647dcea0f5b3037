// What is done with each frame: at CPL3, natively. Only on what it is given.
#include "net.h"

static inline u64 net_word(u64 number, u64 index)
{
	return (number + 1) * 0x9e3779b97f4a7c15ull ^ (index + 1) * 0xbf58476d1ce4e5b9ull;
}

// Lengths of all kinds, the longest and the shortest among them.
u64 net_length(u64 number)
{
	switch (number % 4) {
	case 0: return 1514;
	case 1: return 60;
	default: return 60 + number * 7919 % 1455;
	}
}

static void put_bytes(u8 *to, u64 bytes, u32 count)
{
	for (u32 i = 0; i < count; i++)
		to[i] = (u8)(bytes >> 8 * i);
}

static void build(u8 *buffer, const struct net_batch *batch, u64 number, u32 length)
{
	struct net_frame *frame = (struct net_frame *)(buffer + NET_HEADER);
	u32 words = (length - FRAME_FIXED) / 8, rest = (length - FRAME_FIXED) % 8;

	put_bytes(buffer, 0, NET_HEADER > 8 ? 8 : NET_HEADER);
	put_bytes(buffer + 8, 0, NET_HEADER - 8);
	put_bytes(frame->to, batch->to, 6);
	put_bytes(frame->from, batch->from, 6);
	frame->type[0] = 0x88;
	frame->type[1] = 0xb5;
	frame->length = (u16)length;
	frame->number = number;
	for (u32 i = 0; i < words; i++)
		frame->words[i] = net_word(number, i);
	put_bytes((u8 *)&frame->words[words], net_word(number, words), rest);
}

// Build and queue frames until the batch is done or no slot is free; how many. The caller
// publishes them.
u64 user_net_fill(struct net_queue *queue, struct net_batch *batch)
{
	u64 done = 0;

	for (; done < batch->count; done++) {
		u64 number = batch->first + done;
		u32 length = (u32)(batch->length ? batch->length : net_length(number));
		u32 slot = queue->published % queue->slots;
		u8 *buffer = queue->pool + slot * queue->buffer;

		if (queue->busy[slot])
			break;
		build(buffer, batch, number, length);
		queue->desc[slot] = (struct desc){ (u64)buffer, NET_HEADER + length, 0, 0 };
		queue->busy[slot] = true;
		queue->avail.ring[queue->published++ % queue->size] = (u16)slot;
	}
	return done;
}

static bool is_right(const struct net_frame *frame, u64 length)
{
	u64 words = (length - FRAME_FIXED) / 8, rest = (length - FRAME_FIXED) % 8, last;

	if (frame->length != length)
		return false;
	for (u64 i = 0; i < words; i++)
		if (frame->words[i] != net_word(frame->number, i))
			return false;
	last = net_word(frame->number, words);
	for (u64 i = 0; i < rest; i++)
		if (((const u8 *)&frame->words[words])[i] != (u8)(last >> 8 * i))
			return false;
	return true;
}

static void count_frame(struct net_tally *tally, u64 total)
{
	const struct net_frame *frame = (const struct net_frame *)(tally->scratch + NET_HEADER);
	u64 length = total - NET_HEADER, index;

	if (length > tally->largest)
		tally->largest = length;
	if (length < FRAME_FIXED || frame->type[0] != 0x88 || frame->type[1] != 0xb5) {
		tally->other++;
		return;
	}
	if (!is_right(frame, length)) {
		tally->bad++;
		return;
	}
	index = frame->number - tally->first;
	if (index >= tally->count) {
		tally->other++;
		return;
	}
	if (tally->seen[index]) {
		tally->twice++;
		return;
	}
	tally->seen[index] = 1;
	if (frame->number < tally->highest)
		tally->late++;
	else
		tally->highest = frame->number;
	tally->frames++;
	tally->bytes += length;
}

// The next used buffer behind what is in `scratch`, and back on the ring; its length.
static u64 take_buffer(struct net_queue *queue, struct net_tally *tally, u64 at)
{
	u32 place = queue->last_used % queue->size;
	u32 id = *(volatile u32 *)&queue->used.ring[place].id;
	u32 length = *(volatile u32 *)&queue->used.ring[place].length;

	if (id >= queue->slots || !queue->busy[id]) {
		tally->broken = 1 + id;
		return 0;
	}
	if (!length || length > queue->buffer || at + length > GIANT) {
		tally->broken = 1ull << 32 | length;
		return 0;
	}
	for (u32 i = 0; i < length; i++)
		tally->scratch[at + i] = queue->pool[id * queue->buffer + i];
	queue->last_used++;
	queue->avail.ring[queue->published++ % queue->size] = (u16)id;
	tally->buffers++;
	return length;
}

// All frames that the device has published; the number of used buffers.
u64 user_net_collect(struct net_queue *queue, struct net_tally *tally)
{
	u16 begin = queue->last_used;

	while (*(volatile u16 *)&queue->used.index != queue->last_used && !tally->broken) {
		u64 total = take_buffer(queue, tally, 0);
		u32 more = 0;

		if (tally->broken)
			break;
		if (total < NET_HEADER) {
			tally->broken = 2ull << 32 | total;
			break;
		}
		tally->header = *(u64 *)tally->scratch;
		if (tally->mergeable)
			more = *(u16 *)(tally->scratch + 10) - 1u;
		for (; more && !tally->broken; more--) {
			// All buffers of a frame are there, or none.
			if (*(volatile u16 *)&queue->used.index == queue->last_used)
				tally->broken = 3ull << 32 | more;
			else
				total += take_buffer(queue, tally, total);
		}
		if (!tally->broken)
			count_frame(tally, total);
	}
	return (u16)(queue->last_used - begin);
}

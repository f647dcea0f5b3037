#include "virtq/inflight.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

size_t sv_inflight_size(unsigned int size)
{
	size_t bytes = sizeof(struct sv_inflight_queue) + size * sizeof(struct sv_inflight_desc);

	return (bytes + SV_INFLIGHT_ALIGN - 1) & ~(size_t)(SV_INFLIGHT_ALIGN - 1);
}

// Requests whose completion was published in the used ring, but which were not yet marked as
// done when the last back end died: they hang together from last_batch_head.
static int finish_batch(struct sv_inflight_queue *queue, unsigned int size, uint16_t used_idx)
{
	uint16_t missing = (uint16_t)(used_idx - queue->used_idx);
	uint16_t head = queue->last_batch_head;

	if (missing > size)
		return -EBADMSG;
	while (missing--) {
		if (head >= size)
			return -EBADMSG;
		queue->desc[head].inflight = 0;
		head = queue->desc[head].next;
	}
	queue->used_idx = used_idx;
	return 0;
}

struct entry {
	uint64_t counter;
	uint16_t head;
};

static int by_counter(const void *a, const void *b)
{
	uint64_t x = ((const struct entry *)a)->counter;
	uint64_t y = ((const struct entry *)b)->counter;

	return x < y ? -1 : x > y;
}

int sv_inflight_recover(struct sv_inflight_queue *queue, unsigned int size, uint16_t used_idx,
			uint16_t *heads)
{
	struct entry *entries;
	int count = 0;
	int ret;

	if (queue->version == 0) {
		memset(queue, 0, sizeof(*queue) + size * sizeof(queue->desc[0]));
		queue->desc_num = (uint16_t)size;
		queue->used_idx = used_idx;
		// Last: who finds it finds a whole record, even if this process is killed just now.
		__atomic_store_n(&queue->version, SV_INFLIGHT_VERSION, __ATOMIC_RELEASE);
		return 0;
	}
	if (queue->version != SV_INFLIGHT_VERSION || queue->desc_num != size)
		return -EBADMSG;
	ret = finish_batch(queue, size, used_idx);
	if (ret < 0)
		return ret;
	entries = calloc(size, sizeof(*entries));
	if (!entries)
		return -ENOMEM;
	for (unsigned int i = 0; i < size; i++) {
		if (queue->desc[i].inflight)
			entries[count++] = (struct entry){queue->desc[i].counter, (uint16_t)i};
	}
	qsort(entries, (size_t)count, sizeof(*entries), by_counter);
	for (int i = 0; i < count; i++)
		heads[i] = entries[i].head;
	free(entries);
	return count;
}

#include "virtq/virtq.h"

#include <errno.h>
#include <string.h>

#include <linux/virtio_config.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "virtio 1 is little endian");

// One read or write, neither torn nor repeated by the compiler: the guest may write meanwhile.
#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define STORE(x, value) __atomic_store_n(&(x), (value), __ATOMIC_RELAXED)

static int broken(struct sv_virtq *vq, const char *reason)
{
	vq->broken = true;
	vq->reason = reason;
	return -EBADMSG;
}

static bool is_busy(const struct sv_virtq *vq, uint16_t head)
{
	return vq->busy[head / 64] & (1ull << (head % 64));
}

static int recover(struct sv_virtq *vq, struct sv_inflight_queue *inflight)
{
	bool fresh = LOAD(inflight->version) == 0;
	int count = sv_inflight_recover(inflight, vq->size, vq->used_idx, vq->resubmit);

	if (count < 0)
		return count;
	vq->inflight = inflight;
	if (fresh)
		return 0;
	vq->resubmit_count = (uint16_t)count;
	// What was in flight had been taken: it lies between the used and the next entry.
	vq->last_avail = (uint16_t)(vq->used_idx + count);
	vq->counter = 0;
	for (unsigned int i = 0; i < vq->size; i++) {
		uint64_t counter = LOAD(inflight->desc[i].counter);

		if (LOAD(inflight->desc[i].inflight) && counter >= vq->counter)
			vq->counter = counter + 1;
	}
	return 0;
}

int sv_virtq_start(struct sv_virtq *vq, const struct sv_memory *memory, unsigned int size,
		   uint64_t desc, uint64_t avail, uint64_t used, uint64_t features,
		   uint16_t base, struct sv_inflight_queue *inflight)
{
	// virtio 1.2, 2.7: sizes and alignments of the three parts. The event index fields at
	// their ends are always demanded: 2 bytes more than the smallest legal ring.
	uint64_t avail_bytes = sizeof(struct vring_avail) + 2ull * size + 2;
	uint64_t used_bytes = sizeof(struct vring_used) + sizeof(struct vring_used_elem) * (uint64_t)size + 2;

	if (!size || size > SV_VIRTQ_MAX_SIZE || (size & (size - 1)))
		return -EINVAL;
	memset(vq, 0, sizeof(*vq));
	vq->memory = memory;
	vq->size = (uint16_t)size;
	vq->event_idx = features & (1ull << VIRTIO_RING_F_EVENT_IDX);
	vq->indirect = features & (1ull << VIRTIO_RING_F_INDIRECT_DESC);
	if ((desc & 15) || (avail & 1) || (used & 3))
		return -EINVAL;
	vq->desc = sv_memory_range(memory, desc, sizeof(struct vring_desc) * (uint64_t)size);
	vq->avail = sv_memory_range(memory, avail, avail_bytes);
	vq->used = sv_memory_range(memory, used, used_bytes);
	// The host address may be less aligned than the guest's: the region decides.
	if (!vq->desc || !vq->avail || !vq->used || ((uintptr_t)vq->desc & 15) ||
	    ((uintptr_t)vq->avail & 1) || ((uintptr_t)vq->used & 3))
		return -EINVAL;
	vq->avail_event = (void *)&vq->used->ring[size];
	vq->used_idx = LOAD(vq->used->idx);
	vq->used_published = vq->used_idx;
	vq->signalled = vq->used_idx;
	vq->last_avail = base;
	vq->avail_seen = base;
	if (inflight) {
		int ret = recover(vq, inflight);

		if (ret < 0)
			return ret;
		vq->avail_seen = vq->last_avail;
	}
	return 0;
}

void sv_virtq_stop(struct sv_virtq *vq)
{
	// Nobody looks any more: a driver that goes on must kick, for whoever serves the ring next, and
	// may wait without having asked (qemu-storage-daemon does, until it takes its first entry).
	sv_virtq_enable_kicks(vq);
	// Nothing is in flight: the driver may come back with another ring, from index 0.
	if (vq->inflight)
		memset(vq->inflight, 0, sizeof(*vq->inflight));
	vq->inflight = NULL;
}

unsigned int sv_virtq_pending(struct sv_virtq *vq)
{
	unsigned int undone = (unsigned int)(vq->resubmit_count - vq->resubmit_next);
	uint16_t count;

	if (vq->broken)
		return 0;
	count = (uint16_t)(vq->avail_seen - vq->last_avail);
	if (!count) {
		// Entries before the index that covers them: pairs with the driver's barrier.
		vq->avail_seen = __atomic_load_n(&vq->avail->idx, __ATOMIC_ACQUIRE);
		count = (uint16_t)(vq->avail_seen - vq->last_avail);
		if (count > vq->size) {
			broken(vq, "the available index runs ahead by more than the queue's size");
			return 0;
		}
	}
	return count + undone;
}

static int add_buffer(struct sv_virtq *vq, struct sv_chain *chain, uint64_t addr, uint32_t len,
		      bool writable)
{
	uint64_t left = len;

	if (!len)
		return broken(vq, "a buffer of length zero");
	if (!writable && chain->in_count)
		return broken(vq, "a readable buffer follows a writable one");
	// A guest-contiguous buffer may cross from one region into the next.
	while (left) {
		unsigned int count = chain->out_count + chain->in_count;
		uint64_t piece;
		void *host = sv_memory_guest(vq->memory, addr, left, &piece);

		if (!host)
			return broken(vq, "a buffer outside guest memory");
		if (count == SV_CHAIN_MAX)
			return broken(vq, "a chain with too many buffers");
		chain->iov[count] = (struct iovec){host, piece};
		if (writable)
			chain->in_count++;
		else
			chain->out_count++;
		addr += piece;
		left -= piece;
	}
	if (writable)
		chain->in_bytes += len;
	else
		chain->out_bytes += len;
	return 0;
}

// An indirect table need not be aligned.
typedef uint64_t __attribute__((aligned(1), may_alias)) word;

// A private copy of one descriptor, read once: it is checked and used from there only.
static struct vring_desc copy_desc(const void *at)
{
	const volatile word *from = at;
	struct vring_desc desc;
	uint64_t words[2] = {from[0], from[1]};

	memcpy(&desc, words, sizeof(desc));
	return desc;
}

// Walk an indirect table (2.7.5.3): its entries may lie in several regions.
static int walk_indirect(struct sv_virtq *vq, struct sv_chain *chain, uint64_t table, uint32_t len)
{
	uint32_t entries = len / sizeof(struct vring_desc);
	uint32_t index = 0;

	if (!len || len % sizeof(struct vring_desc))
		return broken(vq, "an indirect table whose length is no multiple of 16");
	for (uint32_t steps = 0; steps < entries; steps++) {
		struct vring_desc desc;
		uint64_t addr = table + (uint64_t)index * sizeof(desc);
		uint64_t piece;
		void *at = sv_memory_guest(vq->memory, addr, sizeof(desc), &piece);
		int ret;

		if (!at || piece < sizeof(desc) || addr < table)
			return broken(vq, "an indirect table outside guest memory");
		desc = copy_desc(at);
		if (desc.flags & VRING_DESC_F_INDIRECT)
			return broken(vq, "an indirect descriptor in an indirect table");
		ret = add_buffer(vq, chain, desc.addr, desc.len, desc.flags & VRING_DESC_F_WRITE);
		if (ret < 0)
			return ret;
		if (!(desc.flags & VRING_DESC_F_NEXT))
			return 0;
		index = desc.next;
		if (index >= entries)
			return broken(vq, "an indirect descriptor's next is beyond its table");
	}
	return broken(vq, "an indirect chain that loops");
}

static int walk(struct sv_virtq *vq, struct sv_chain *chain, uint16_t head)
{
	uint16_t index = head;

	chain->head = head;
	chain->out_count = 0;
	chain->in_count = 0;
	chain->out_bytes = 0;
	chain->in_bytes = 0;
	for (unsigned int steps = 0; steps < vq->size; steps++) {
		struct vring_desc desc = copy_desc(&vq->desc[index]);
		int ret;

		if (desc.flags & VRING_DESC_F_INDIRECT) {
			if (!vq->indirect)
				return broken(vq, "an indirect descriptor that was not negotiated");
			if (desc.flags & VRING_DESC_F_NEXT)
				return broken(vq, "an indirect descriptor with a next one");
			return walk_indirect(vq, chain, desc.addr, desc.len);
		}
		ret = add_buffer(vq, chain, desc.addr, desc.len, desc.flags & VRING_DESC_F_WRITE);
		if (ret < 0)
			return ret;
		if (!(desc.flags & VRING_DESC_F_NEXT))
			return 0;
		index = desc.next;
		if (index >= vq->size)
			return broken(vq, "a descriptor's next is beyond the queue's size");
	}
	return broken(vq, "a chain that loops");
}

int sv_virtq_pop(struct sv_virtq *vq, struct sv_chain *chain)
{
	uint16_t head;
	int ret;

	if (!sv_virtq_pending(vq))
		return vq->broken ? -EBADMSG : 0;
	if (vq->resubmit_next < vq->resubmit_count) {
		head = vq->resubmit[vq->resubmit_next++];
	} else {
		head = LOAD(vq->avail->ring[vq->last_avail & (vq->size - 1)]);
		vq->last_avail++;
	}
	if (head >= vq->size)
		return broken(vq, "an available entry beyond the queue's size");
	if (is_busy(vq, head))
		return broken(vq, "a chain made available twice");
	ret = walk(vq, chain, head);
	if (ret < 0)
		return ret;
	vq->busy[head / 64] |= 1ull << (head % 64);
	if (vq->inflight) {
		vq->inflight->desc[head].counter = vq->counter++;
		__atomic_store_n(&vq->inflight->desc[head].inflight, 1, __ATOMIC_RELEASE);
	}
	return 1;
}

void sv_virtq_prefetch(const struct sv_virtq *vq)
{
	struct vring_desc desc;
	uint64_t piece;
	uint16_t head;
	uint8_t *host;

	if (vq->last_avail == vq->avail_seen)
		return;
	head = LOAD(vq->avail->ring[vq->last_avail & (vq->size - 1)]);
	if (head >= vq->size)
		return;
	desc = copy_desc(&vq->desc[head]);
	host = sv_memory_guest(vq->memory, desc.addr, 1, &piece);
	if (!host)
		return;
	__builtin_prefetch(host);
	__builtin_prefetch(host + 64);
}

void sv_virtq_unpop(struct sv_virtq *vq, uint16_t head)
{
	vq->busy[head / 64] &= ~(1ull << (head % 64));
	vq->last_avail--;
}

void sv_virtq_break(struct sv_virtq *vq, const char *reason)
{
	broken(vq, reason);
}

void sv_virtq_push(struct sv_virtq *vq, uint16_t head, uint32_t written)
{
	struct vring_used_elem *elem = &vq->used->ring[vq->used_idx & (vq->size - 1)];

	// A driver that hands out heads again before they were published must not overflow us.
	if ((uint16_t)(vq->used_idx - vq->used_published) == vq->size)
		sv_virtq_publish(vq);
	STORE(elem->id, head);
	STORE(elem->len, written);
	vq->busy[head / 64] &= ~(1ull << (head % 64));
	if (vq->inflight) {
		// The link before the head that leads to it, both before the used index.
		vq->completed[(uint16_t)(vq->used_idx - vq->used_published)] = head;
		vq->inflight->desc[head].next = vq->batch_head;
		__atomic_store_n(&vq->inflight->last_batch_head, head, __ATOMIC_RELEASE);
		vq->batch_head = head;
	}
	vq->used_idx++;
}

void sv_virtq_publish(struct sv_virtq *vq)
{
	uint16_t count = (uint16_t)(vq->used_idx - vq->used_published);

	if (!count)
		return;
	// Used entries (and the status bytes before them) before the index that covers them.
	__atomic_store_n(&vq->used->idx, vq->used_idx, __ATOMIC_RELEASE);
	vq->used_published = vq->used_idx;
	if (!vq->inflight)
		return;
	for (uint16_t i = 0; i < count; i++)
		__atomic_store_n(&vq->inflight->desc[vq->completed[i]].inflight, 0,
				 __ATOMIC_RELEASE);
	__atomic_store_n(&vq->inflight->used_idx, vq->used_idx, __ATOMIC_RELEASE);
}

bool sv_virtq_wants_call(struct sv_virtq *vq)
{
	uint16_t old = vq->signalled;
	uint16_t event;

	if (old == vq->used_published)
		return false;
	// The used index must be visible before the driver's wish is read, else both sides may
	// conclude that the other one will look (2.7.7).
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!vq->event_idx) {
		vq->signalled = vq->used_published;
		vq->signalled_valid = true;
		return !(LOAD(vq->avail->flags) & VRING_AVAIL_F_NO_INTERRUPT);
	}
	event = LOAD(vq->avail->ring[vq->size]);
	vq->signalled = vq->used_published;
	if (!vq->signalled_valid) {
		vq->signalled_valid = true;
		return true;
	}
	return vring_need_event(event, vq->used_published, old);
}

bool sv_virtq_enable_kicks(struct sv_virtq *vq)
{
	if (vq->broken)
		return false;
	if (vq->event_idx)
		__atomic_store_n(vq->avail_event, vq->last_avail, __ATOMIC_RELAXED);
	else
		STORE(vq->used->flags, 0);
	// Our wish must be visible before the index is read (2.7.10), as above.
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return sv_virtq_pending(vq) > 0;
}

void sv_virtq_disable_kicks(struct sv_virtq *vq)
{
	if (vq->broken)
		return;
	if (!vq->event_idx)
		STORE(vq->used->flags, VRING_USED_F_NO_NOTIFY);
	else if (!sv_virtq_pending(vq))
		// Not a kick ended the wait: the driver has yet to pass the index that we wanted
		// one for, so that index goes behind it. Once passed, a stale one suffices.
		__atomic_store_n(vq->avail_event, (uint16_t)(vq->last_avail - 1), __ATOMIC_RELAXED);
}

#include "ledger.h"

#include <string.h>

#include "guest.h"
#include "intercept.h"
#include "tape.h"

#undef sv_virtq_start
#undef sv_virtq_pop
#undef sv_virtq_unpop
#undef sv_virtq_push

struct ledger ledgers[LEDGER_QUEUES];
void (*ledger_popped)(unsigned int index, struct sv_chain *chain);
void (*ledger_pushing)(unsigned int index, uint16_t head, uint32_t written);
unsigned int (*ledger_index)(const struct sv_virtq *vq);
unsigned long ledger_calls;

static struct ledger *find(const struct sv_virtq *vq)
{
	unsigned int index = ledger_index(vq);

	CHECK(index < LEDGER_QUEUES && ledgers[index].vq == vq);
	return &ledgers[index];
}

static void drop(struct ledger_chain *chain)
{
	free(chain->iov);
	*chain = (struct ledger_chain){0};
}

static void drop_all(struct ledger *ledger)
{
	while (ledger->taken)
		drop(&ledger->chains[ledger->order[--ledger->taken]]);
}

int fuzz_virtq_start(struct sv_virtq *vq, const struct sv_memory *memory, unsigned int size,
		     uint64_t desc, uint64_t avail, uint64_t used, uint64_t features,
		     uint16_t base, struct sv_inflight_queue *inflight)
{
	struct ledger *ledger = &ledgers[ledger_index(vq)];
	int ret;

	CHECK(!ledger->vq && !ledger->taken);
	ret = sv_virtq_start(vq, memory, size, desc, avail, used, features, base, inflight);
	if (ret < 0)
		return ret;
	guest_allow_ring(&(struct guest_ring){.size = size, .used = used});
	ledger->vq = vq;
	ledger->base = base;
	ledger->pops = ledger->pushes = 0;
	return ret;
}

void ledger_cancel(unsigned int index)
{
	CHECK(!ledgers[index].taken);
	ledgers[index].vq = NULL;
}

void ledger_end(unsigned int index, int next)
{
	struct ledger *ledger = &ledgers[index];
	// The chain that broke the queue may be neither given back nor available again.
	bool broken = ledger->vq->broken;

	CHECK(next >= 0 && next <= UINT16_MAX);
	CHECK(ledger->taken <= broken);
	if (next != (uint16_t)(ledger->base + ledger->pushes))
		CHECK(broken && next == (uint16_t)(ledger->base + ledger->pushes + 1));
	CHECK(ledger->vq->used_published == ledger->vq->used_idx);
	drop_all(ledger);
	ledger->vq = NULL;
}

void ledger_forget(void)
{
	for (unsigned int i = 0; i < LEDGER_QUEUES; i++) {
		drop_all(&ledgers[i]);
		ledgers[i].vq = NULL;
		ledgers[i].all_pushes = 0;
	}
	ledger_popped = NULL;
	ledger_pushing = NULL;
	ledger_calls = 0;
}

static void allow(const struct ledger_chain *chain)
{
	for (unsigned int i = 0; i < chain->in_count; i++)
		guest_allow(chain->iov[chain->out_count + i].iov_base,
			    chain->iov[chain->out_count + i].iov_len);
}

void ledger_allow(unsigned int index)
{
	const struct ledger *ledger = &ledgers[index];

	for (unsigned int i = 0; i < ledger->taken; i++)
		allow(&ledger->chains[ledger->order[i]]);
}

static void check_chain(const struct sv_chain *chain)
{
	unsigned int count = chain->out_count + chain->in_count;
	uint64_t out = 0, in = 0;

	CHECK(count && count <= SV_CHAIN_MAX);
	for (unsigned int i = 0; i < count; i++) {
		CHECK(chain->iov[i].iov_len);
		CHECK(guest_owns(chain->iov[i].iov_base, chain->iov[i].iov_len));
		*(i < chain->out_count ? &out : &in) += chain->iov[i].iov_len;
	}
	CHECK(out == chain->out_bytes && in == chain->in_bytes);
}

int fuzz_virtq_pop(struct sv_virtq *vq, struct sv_chain *chain)
{
	struct ledger *ledger = find(vq);
	struct ledger_chain *entry;
	size_t bytes;
	int ret = sv_virtq_pop(vq, chain);

	__atomic_add_fetch(&ledger_calls, 1, __ATOMIC_RELAXED);
	CHECK(ret <= 0 || !vq->broken);
	if (ret <= 0)
		return ret;
	check_chain(chain);
	CHECK(chain->head < vq->size && vq->size <= LEDGER_SIZE);
	entry = &ledger->chains[chain->head];
	CHECK(!entry->taken);
	bytes = (size_t)(chain->out_count + chain->in_count) * sizeof(struct iovec);
	*entry = (struct ledger_chain){true, chain->out_count, chain->in_count, chain->in_bytes,
				       malloc(bytes)};
	memcpy(entry->iov, chain->iov, bytes);
	allow(entry);
	ledger->order[ledger->taken++] = chain->head;
	ledger->pops++;
	if (ledger_popped)
		ledger_popped((unsigned int)(ledger - ledgers), chain);
	return ret;
}

static struct ledger_chain *give_back(struct ledger *ledger, uint16_t head)
{
	unsigned int at = 0;

	CHECK(head < LEDGER_SIZE && ledger->chains[head].taken);
	while (ledger->order[at] != head)
		at++;
	ledger->taken--;
	memmove(&ledger->order[at], &ledger->order[at + 1],
		(ledger->taken - at) * sizeof(ledger->order[0]));
	return &ledger->chains[head];
}

void fuzz_virtq_unpop(struct sv_virtq *vq, uint16_t head)
{
	struct ledger *ledger = find(vq);

	// In a broken queue the chain that broke it may lie above.
	CHECK(ledger->taken && (vq->broken || ledger->order[ledger->taken - 1] == head));
	drop(give_back(ledger, head));
	ledger->pops--;
	sv_virtq_unpop(vq, head);
}

void fuzz_virtq_push(struct sv_virtq *vq, uint16_t head, uint32_t written)
{
	struct ledger *ledger = find(vq);

	__atomic_add_fetch(&ledger_calls, 1, __ATOMIC_RELAXED);
	if (ledger_pushing)
		ledger_pushing((unsigned int)(ledger - ledgers), head, written);
	CHECK(written <= ledger->chains[head].in_bytes);
	drop(give_back(ledger, head));
	ledger->pushes++;
	ledger->all_pushes++;
	sv_virtq_push(vq, head, written);
}

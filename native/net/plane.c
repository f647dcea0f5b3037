// Set-up and control calls.
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "net/internal.h"

static void init_queue(struct sv_net *net, unsigned int index, const int *taps,
		       struct sv_net_counters *counters)
{
	struct sv_net_queue *queue = &net->queues[index];

	queue->net = net;
	queue->counters = &counters[index];
	if (index == 2 * net->pairs) {
		queue->kind = SV_NET_CONTROL;
		queue->tap = -1;
		return;
	}
	queue->kind = index % 2 ? SV_NET_TRANSMIT : SV_NET_RECEIVE;
	queue->tap = taps[index / 2];
}

static void power_on(struct sv_net *net)
{
	sv_net_filter_reset(&net->settings.filter, net->mac);
	net->settings.offloads = 0;
	net->settings.pairs = 1; // until the driver asks for more (5.1.6.5.5)
}

// Go on with a predecessor's settings, or as after power-on. A predecessor may still serve: its
// tap is left alone until the features are set, and what it changes until then is read there.
static int begin(struct sv_net *net)
{
	net->resumed = sv_net_load(net);
	return net->resumed ? 0 : sv_net_reset(net);
}

struct sv_net *sv_net_create(const int *taps, unsigned int pairs, bool control,
			     unsigned int queue_size, const uint8_t *mac,
			     const struct sv_rate *limits,
			     struct sv_net_counters *counters, struct sv_net_state *state,
			     int *error)
{
	unsigned int count = 2 * pairs + control;
	struct sv_net *net;

	*error = -EINVAL;
	if (!pairs || pairs > SV_NET_MAX_PAIRS || !queue_size || queue_size > SV_VIRTQ_MAX_SIZE)
		return NULL;
	*error = -ENOMEM;
	net = calloc(1, sizeof(*net) + count * sizeof(struct sv_net_queue));
	if (!net)
		return NULL;
	net->pairs = pairs;
	net->max_size = queue_size;
	memcpy(net->mac, mac, SV_NET_MAC_BYTES);
	pthread_mutex_init(&net->lock, NULL);
	net->state = state;
	for (unsigned int i = 0; i < 2; i++)
		sv_bucket_init(&net->buckets[i], &limits[i], SV_NET_BURST_NS);
	for (; net->count < count; net->count++) {
		init_queue(net, net->count, taps, counters);
		*error = sv_net_queue_init(&net->queues[net->count]);
		if (*error) {
			sv_net_destroy(net);
			return NULL;
		}
	}
	*error = begin(net);
	if (*error) {
		sv_net_destroy(net);
		return NULL;
	}
	return net;
}

void sv_net_destroy(struct sv_net *net)
{
	for (unsigned int i = 0; i < net->count; i++)
		sv_net_queue_end(&net->queues[i]);
	for (unsigned int i = 0; i < net->count; i++)
		sv_net_queue_deinit(&net->queues[i]);
	for (unsigned int i = 0; i < 2; i++)
		sv_bucket_deinit(&net->buckets[i]);
	pthread_mutex_destroy(&net->lock);
	sv_memory_clear(&net->memory);
	free(net);
}

static bool is_running(const struct sv_net *net)
{
	for (unsigned int i = 0; i < net->count; i++) {
		if (net->queues[i].running)
			return true;
	}
	return false;
}

int sv_net_add_region(struct sv_net *net, uint64_t guest_addr, uint64_t size, uint64_t offset,
		      int fd)
{
	if (is_running(net))
		return -EBUSY;
	return sv_memory_add(&net->memory, guest_addr, size, offset, fd);
}

int sv_net_remove_region(struct sv_net *net, uint64_t guest_addr, uint64_t size)
{
	if (is_running(net))
		return -EBUSY;
	return sv_memory_remove(&net->memory, guest_addr, size);
}

int sv_net_clear_regions(struct sv_net *net)
{
	if (is_running(net))
		return -EBUSY;
	sv_memory_clear(&net->memory);
	return 0;
}

static int apply_settings(struct sv_net *net, uint64_t features)
{
	uint64_t offloads = features;
	int ret;

	// The driver may have turned some off in a predecessor's life.
	if (net->resumed && !(net->settings.offloads & ~features))
		offloads = net->settings.offloads;
	net->features = features;
	ret = sv_net_apply_pairs(net, net->settings.pairs);
	if (!ret)
		ret = sv_net_apply_offloads(net, offloads);
	sv_net_save(net);
	return ret;
}

int sv_net_set_features(struct sv_net *net, uint64_t features)
{
	int ret = 0;
	bool moved;

	pthread_mutex_lock(&net->lock);
	moved = sv_net_state_moved(net);
	if (moved) {
		net->resumed = sv_net_load(net);
		if (!net->resumed)
			power_on(net);
		__atomic_add_fetch(&net->filter_version, 1, __ATOMIC_RELEASE);
	}
	if (moved || features != net->features)
		ret = apply_settings(net, features);
	pthread_mutex_unlock(&net->lock);
	return ret;
}

int sv_net_reset(struct sv_net *net)
{
	int ret;

	pthread_mutex_lock(&net->lock);
	power_on(net);
	__atomic_add_fetch(&net->filter_version, 1, __ATOMIC_RELEASE);
	net->features = 0;
	net->resumed = false;
	ret = sv_net_apply_offloads(net, 0);
	if (!ret)
		ret = sv_net_apply_pairs(net, net->settings.pairs);
	sv_net_save(net);
	pthread_mutex_unlock(&net->lock);
	return ret;
}

void sv_net_mac(struct sv_net *net, uint8_t *mac)
{
	pthread_mutex_lock(&net->lock);
	memcpy(mac, net->settings.filter.mac, SV_NET_MAC_BYTES);
	pthread_mutex_unlock(&net->lock);
}

void sv_net_set_link(struct sv_net *net, bool up)
{
	__atomic_store_n(&net->link_down, !up, __ATOMIC_RELAXED);
}

int sv_net_start(struct sv_net *net, unsigned int index, const struct sv_net_ring *ring)
{
	if (index >= net->count || ring->size > net->max_size)
		return -EINVAL;
	if (net->queues[index].running)
		return -EBUSY;
	return sv_net_queue_run(&net->queues[index], ring);
}

int sv_net_stop(struct sv_net *net, unsigned int index)
{
	return index < net->count ? sv_net_queue_end(&net->queues[index]) : -EINVAL;
}

int sv_net_set_call(struct sv_net *net, unsigned int index, int fd)
{
	if (index >= net->count)
		return -EINVAL;
	return sv_signals_set_call(&net->queues[index].signals, fd);
}

const char *sv_net_broken(struct sv_net *net, unsigned int index)
{
	if (index >= net->count ||
	    !__atomic_load_n(&net->queues[index].counters->broken, __ATOMIC_ACQUIRE))
		return NULL;
	return net->queues[index].vq.reason;
}

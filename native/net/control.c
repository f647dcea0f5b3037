// The control queue (virtio 1.2, 5.1.6.5): what the driver wants to receive, its MAC address,
// VLANs, active queue pairs and offloads.
#include <string.h>

#include <linux/virtio_net.h>

#include "net/internal.h"

// Bytes of the longest command: buffers of a guest may overlap, and terabytes of addresses would
// keep the lock, and whoever wants to stop the queue, for minutes.
#define COMMAND_MAX (1 << 20)

// Reads the readable buffers of a command from front to back.
struct cursor {
	const struct sv_chain *chain;
	unsigned int index;
	size_t offset;
};

static bool take(struct cursor *cursor, void *data, size_t len)
{
	uint8_t *to = data;

	while (len) {
		const struct iovec *iov = &cursor->chain->iov[cursor->index];
		size_t piece;

		if (cursor->index == cursor->chain->out_count)
			return false;
		piece = iov->iov_len - cursor->offset;
		if (piece > len)
			piece = len;
		memcpy(to, (uint8_t *)iov->iov_base + cursor->offset, piece);
		to += piece;
		len -= piece;
		cursor->offset += piece;
		if (cursor->offset == iov->iov_len) {
			cursor->index++;
			cursor->offset = 0;
		}
	}
	return true;
}

static bool has(const struct sv_net_queue *queue, unsigned int feature)
{
	return queue->features & (1ull << feature);
}

static bool set_mode(struct sv_net_queue *queue, uint8_t command, struct cursor *cursor)
{
	struct sv_net_filter *filter = &queue->net->settings.filter;
	uint8_t *const modes[] = {
		[VIRTIO_NET_CTRL_RX_PROMISC] = &filter->promiscuous,
		[VIRTIO_NET_CTRL_RX_ALLMULTI] = &filter->all_multicast,
		[VIRTIO_NET_CTRL_RX_ALLUNI] = &filter->all_unicast,
		[VIRTIO_NET_CTRL_RX_NOMULTI] = &filter->no_multicast,
		[VIRTIO_NET_CTRL_RX_NOUNI] = &filter->no_unicast,
		[VIRTIO_NET_CTRL_RX_NOBCAST] = &filter->no_broadcast,
	};
	unsigned int feature = command <= VIRTIO_NET_CTRL_RX_ALLMULTI ? VIRTIO_NET_F_CTRL_RX
								      : VIRTIO_NET_F_CTRL_RX_EXTRA;
	uint8_t on;

	if (command >= sizeof(modes) / sizeof(modes[0]) || !has(queue, feature) ||
	    !take(cursor, &on, 1) || on > 1)
		return false;
	*modes[command] = on;
	return true;
}

// One list of the MAC table; more entries than fit mean that everything of the kind passes.
static bool take_macs(struct cursor *cursor, uint8_t (*macs)[SV_NET_MAC_BYTES],
		      unsigned int *count, uint8_t *overflow)
{
	uint32_t entries;
	uint8_t skipped[SV_NET_MAC_BYTES];

	if (!take(cursor, &entries, sizeof(entries)))
		return false;
	*overflow = entries > SV_NET_MAC_ENTRIES;
	*count = *overflow ? 0 : entries;
	// Ends with the buffers, however large the number is.
	for (uint32_t i = 0; i < entries; i++) {
		if (!take(cursor, *overflow ? skipped : macs[i], SV_NET_MAC_BYTES))
			return false;
	}
	return true;
}

static bool set_macs(struct sv_net_queue *queue, uint8_t command, struct cursor *cursor)
{
	struct sv_net_filter *filter = &queue->net->settings.filter;
	struct sv_net_filter next = *filter;

	if (command == VIRTIO_NET_CTRL_MAC_ADDR_SET) {
		if (!has(queue, VIRTIO_NET_F_CTRL_MAC_ADDR) ||
		    !take(cursor, next.mac, SV_NET_MAC_BYTES) || next.mac[0] & 1)
			return false;
	} else if (command == VIRTIO_NET_CTRL_MAC_TABLE_SET) {
		if (!has(queue, VIRTIO_NET_F_CTRL_RX) ||
		    !take_macs(cursor, next.unicast, &next.unicast_count, &next.unicast_overflow) ||
		    !take_macs(cursor, next.multicast, &next.multicast_count,
			       &next.multicast_overflow))
			return false;
	} else {
		return false;
	}
	*filter = next;
	return true;
}

static bool set_vlan(struct sv_net_queue *queue, uint8_t command, struct cursor *cursor)
{
	uint64_t *vlans = queue->net->settings.filter.vlans;
	uint16_t id;

	if (!has(queue, VIRTIO_NET_F_CTRL_VLAN) || !take(cursor, &id, sizeof(id)) || id >= 4096)
		return false;
	if (command == VIRTIO_NET_CTRL_VLAN_ADD)
		vlans[id / 64] |= 1ull << (id % 64);
	else if (command == VIRTIO_NET_CTRL_VLAN_DEL)
		vlans[id / 64] &= ~(1ull << (id % 64));
	else
		return false;
	return true;
}

static bool set_pairs(struct sv_net_queue *queue, uint8_t command, struct cursor *cursor)
{
	uint16_t pairs;

	if (command != VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET || !has(queue, VIRTIO_NET_F_MQ) ||
	    !take(cursor, &pairs, sizeof(pairs)) || !pairs || pairs > queue->net->pairs)
		return false;
	return !sv_net_apply_pairs(queue->net, pairs);
}

static bool set_offloads(struct sv_net_queue *queue, uint8_t command, struct cursor *cursor)
{
	uint64_t offloads;

	if (command != VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET ||
	    !has(queue, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) ||
	    !take(cursor, &offloads, sizeof(offloads)) || offloads & ~queue->features)
		return false;
	return !sv_net_apply_offloads(queue->net, offloads);
}

static bool obey(struct sv_net_queue *queue)
{
	struct cursor cursor = {&queue->chain, 0, 0};
	uint8_t header[2]; // class, command

	if (queue->chain.out_bytes > COMMAND_MAX || !take(&cursor, header, sizeof(header)))
		return false;
	switch (header[0]) {
	case VIRTIO_NET_CTRL_RX: return set_mode(queue, header[1], &cursor);
	case VIRTIO_NET_CTRL_MAC: return set_macs(queue, header[1], &cursor);
	case VIRTIO_NET_CTRL_VLAN: return set_vlan(queue, header[1], &cursor);
	case VIRTIO_NET_CTRL_MQ: return set_pairs(queue, header[1], &cursor);
	case VIRTIO_NET_CTRL_GUEST_OFFLOADS: return set_offloads(queue, header[1], &cursor);
	case VIRTIO_NET_CTRL_ANNOUNCE:
		return header[1] == VIRTIO_NET_CTRL_ANNOUNCE_ACK &&
		       has(queue, VIRTIO_NET_F_GUEST_ANNOUNCE);
	default: return false;
	}
}

bool sv_net_control(struct sv_net_queue *queue)
{
	struct sv_chain *chain = &queue->chain;
	struct sv_net *net = queue->net;
	bool ok;

	if (sv_virtq_pop(&queue->vq, chain) <= 0)
		return false;
	if (!chain->in_bytes) {
		sv_virtq_break(&queue->vq, "a command without room for its answer");
		return false;
	}
	pthread_mutex_lock(&net->lock);
	ok = obey(queue);
	__atomic_add_fetch(&net->filter_version, 1, __ATOMIC_RELEASE);
	sv_net_save(net); // before the answer: what was acknowledged outlives this process
	pthread_mutex_unlock(&net->lock);
	*(uint8_t *)chain->iov[chain->out_count].iov_base = ok ? VIRTIO_NET_OK : VIRTIO_NET_ERR;
	if (ok)
		queue->counters->commands++;
	else
		queue->counters->errors++;
	sv_virtq_push(&queue->vq, chain->head, 1);
	queue->call_due = true;
	return true;
}

// Which frames the guest wants (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3).
#include <string.h>

#include <linux/if_ether.h>
#include <linux/virtio_net.h>

#include "net/internal.h"

#define VLAN_OFFSET 12 // of the tag in a frame
#define VLAN_BYTES 4

void sv_net_filter_reset(struct sv_net_filter *filter, const uint8_t *mac)
{
	memset(filter, 0, sizeof(*filter));
	memcpy(filter->mac, mac, SV_NET_MAC_BYTES);
	// Until a driver says what it wants it gets everything: it may know no commands.
	filter->promiscuous = true;
}

static bool is_listed(const uint8_t (*macs)[SV_NET_MAC_BYTES], unsigned int count,
		      const uint8_t *mac)
{
	for (unsigned int i = 0; i < count; i++) {
		if (!memcmp(macs[i], mac, SV_NET_MAC_BYTES))
			return true;
	}
	return false;
}

static bool is_broadcast(const uint8_t *mac)
{
	static const uint8_t all[SV_NET_MAC_BYTES] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

	return !memcmp(mac, all, sizeof(all));
}

static bool wants_vlan(const struct sv_net_filter *filter, const uint8_t *frame, size_t len)
{
	unsigned int id;

	if (len < VLAN_OFFSET + VLAN_BYTES || frame[VLAN_OFFSET] != (ETH_P_8021Q >> 8) ||
	    frame[VLAN_OFFSET + 1] != (ETH_P_8021Q & 0xff))
		return true;
	id = (unsigned int)(frame[VLAN_OFFSET + 2] & 0x0f) << 8 | frame[VLAN_OFFSET + 3];
	return filter->vlans[id / 64] & (1ull << (id % 64));
}

bool sv_net_filter_wants(const struct sv_net_filter *filter, uint64_t features,
			 const uint8_t *frame, size_t len)
{
	if (len < ETH_ALEN)
		return false;
	if (features & (1ull << VIRTIO_NET_F_CTRL_VLAN) && !wants_vlan(filter, frame, len))
		return false;
	if (filter->promiscuous)
		return true;
	if (is_broadcast(frame))
		return !filter->no_broadcast;
	if (frame[0] & 1) {
		if (filter->no_multicast)
			return false;
		return filter->all_multicast || filter->multicast_overflow ||
		       is_listed(filter->multicast, filter->multicast_count, frame);
	}
	if (filter->no_unicast)
		return false;
	return filter->all_unicast || filter->unicast_overflow ||
	       !memcmp(frame, filter->mac, SV_NET_MAC_BYTES) ||
	       is_listed(filter->unicast, filter->unicast_count, frame);
}

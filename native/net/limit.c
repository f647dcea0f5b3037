// Limits of packets and bytes a second, with bursts of 100 ms of the rate.
#include "include/clock.h"
#include "net/internal.h"

#define SECOND 1000000000ull
#define BURST_NS (SECOND / 10)

void sv_net_bucket_init(struct sv_net_bucket *bucket, const struct sv_net_limits *rate)
{
	pthread_mutex_init(&bucket->lock, NULL);
	bucket->rate = *rate;
	bucket->packets_until = 0;
	bucket->bytes_until = 0;
}

uint64_t sv_net_bucket_wait(struct sv_net_bucket *bucket)
{
	uint64_t until;

	if (!bucket->rate.packets && !bucket->rate.bytes)
		return 0;
	pthread_mutex_lock(&bucket->lock);
	until = bucket->packets_until > bucket->bytes_until ? bucket->packets_until
							    : bucket->bytes_until;
	pthread_mutex_unlock(&bucket->lock);
	return until > sv_now_ns() + BURST_NS ? until - BURST_NS : 0;
}

static uint64_t charge(uint64_t until, uint64_t now, uint64_t amount, uint64_t rate)
{
	if (!rate)
		return 0;
	if (until < now)
		until = now;
	// 128 bits: a frame of 64 KiB times a second.
	return until + (uint64_t)((unsigned __int128)amount * SECOND / rate);
}

void sv_net_bucket_take(struct sv_net_bucket *bucket, uint64_t bytes)
{
	uint64_t now;

	if (!bucket->rate.packets && !bucket->rate.bytes)
		return;
	now = sv_now_ns();
	pthread_mutex_lock(&bucket->lock);
	bucket->packets_until = charge(bucket->packets_until, now, 1, bucket->rate.packets);
	bucket->bytes_until = charge(bucket->bytes_until, now, bytes, bucket->rate.bytes);
	pthread_mutex_unlock(&bucket->lock);
}

#include "limit/limit.h"

#include "include/clock.h"

#define SECOND 1000000000ull

void sv_bucket_init(struct sv_bucket *bucket, const struct sv_rate *rate, uint64_t burst_ns)
{
	pthread_mutex_init(&bucket->lock, NULL);
	bucket->rate = *rate;
	bucket->burst = burst_ns;
	bucket->packets_until = 0;
	bucket->bytes_until = 0;
}

void sv_bucket_deinit(struct sv_bucket *bucket)
{
	pthread_mutex_destroy(&bucket->lock);
}

uint64_t sv_bucket_wait(struct sv_bucket *bucket)
{
	uint64_t until;

	if (!bucket->rate.packets && !bucket->rate.bytes)
		return 0;
	pthread_mutex_lock(&bucket->lock);
	until = bucket->packets_until > bucket->bytes_until ? bucket->packets_until
							    : bucket->bytes_until;
	pthread_mutex_unlock(&bucket->lock);
	return until > sv_now_ns() + bucket->burst ? until - bucket->burst : 0;
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

void sv_bucket_take(struct sv_bucket *bucket, uint64_t bytes)
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

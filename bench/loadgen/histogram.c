// Latencies.
#include "loadgen.h"

void histogram_add(struct histogram *histogram, uint64_t ns)
{
	unsigned int power = 63 - (unsigned int)__builtin_clzll(ns | 16);
	unsigned int bucket = power * 16 + (unsigned int)(ns >> (power - 4) & 15);

	histogram->buckets[bucket]++;
	histogram->count++;
	histogram->sum += ns;
	if (ns > histogram->max)
		histogram->max = ns;
}

uint64_t histogram_quantile(const struct histogram *histogram, double quantile)
{
	uint64_t rank = (uint64_t)(quantile * (double)histogram->count), seen = 0;

	for (unsigned int i = 64; i < 64 * 16; i++) {
		seen += histogram->buckets[i];
		if (seen > rank) // the middle of the bucket
			return (16ull + i % 16) << (i / 16 - 4) | 1ull << (i / 16 - 4) >> 1;
	}
	return histogram->max;
}

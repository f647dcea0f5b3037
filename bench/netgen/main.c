// netgen [options]      one line of JSON on standard output
#include "netgen.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FRAMES_MIN 1000u
#define LIMIT_NS 20000000000ull

const char program[] = "netgen";

static const char usage[] =
	"usage: netgen (--socket PATH --pid PID | --floor FD) --interface NAME [options]\n"
	"\n"
	"  --socket PATH       the back end's vhost-user socket\n"
	"  --pid PID           its process, whose CPU time counts with that of its descendants\n"
	"  --floor FD          an open tap: read() or write() in a loop instead of a back end\n"
	"  --interface NAME    the tap's interface, in the network namespace of this program\n"
	"  --receive           from the host to the guest (the other way)\n"
	"  --length BYTES      of a frame (64)\n"
	"  --gso               TCP segments to be cut to 1448 bytes\n"
	"  --queue-size N      ring entries (256)\n"
	"  --window N          frames on the way at once (as many as the ring holds)\n"
	"  --burst             receiving: that many frames are in the tap before buffers are offered\n"
	"  --buffer BYTES      of a receive buffer (1536)\n"
	"  --seconds S         measured time (1)\n"
	"  --pin CPU           run on that CPU\n"
	"  --floor-pin CPU     run the loop of --floor on that CPU\n"
	"  --no-mergeable      receive buffers that hold whole frames\n"
	"  --no-event-index    without the event index\n"
	"  --no-indirect       without indirect descriptors\n";

void span_begin(struct span *span, double seconds)
{
	uint64_t ns = (uint64_t)(seconds * 1e9);

	*span = (struct span){.warm = now_ns() + ns / 5};
	span->end = span->warm + ns;
	span->limit = span->end + LIMIT_NS;
}

static uint64_t spent(const struct meter *meter)
{
	return meter->spent ? __atomic_load_n(meter->spent, __ATOMIC_ACQUIRE)
			    : cost_ns(&meter->cost);
}

bool span_over(struct span *span, uint64_t frames, const struct meter *meter, struct result *result)
{
	uint64_t now = now_ns();

	if (!span->measuring && now >= span->warm) {
		span->measuring = true;
		span->frames = frames;
		span->cpu = spent(meter);
		span->began = now;
	}
	// Where others have the processors for long, so many frames take longer.
	if (!span->measuring || ((now < span->end || frames - span->frames < FRAMES_MIN) &&
				 now < span->limit))
		return false;
	result->frames = frames - span->frames;
	result->cpu_ns = spent(meter) - span->cpu;
	result->elapsed_ns = now - span->began;
	return true;
}

static void set_option(struct options *options, int option, const char *name, const char *value)
{
	switch (option) {
	case 's': options->socket = value; break;
	case 'p': options->pid = (pid_t)number(name, value); break;
	case 'f': options->tap = (int)number(name, value); break;
	case 'i': options->interface = value; break;
	case 'r': options->direction = RECEIVE; break;
	case 'l': options->length = (uint32_t)number(name, value); break;
	case 'g': options->gso = true; break;
	case 'q': options->queue_size = (unsigned int)number(name, value); break;
	case 'w': options->window = (unsigned int)number(name, value); break;
	case 'u': options->burst = true; break;
	case 'b': options->buffer = (uint32_t)number(name, value); break;
	case 't': options->seconds = strtod(value, NULL); break;
	case 'c': options->pin = (int)number(name, value); break;
	case 'C': options->floor_pin = (int)number(name, value); break;
	case 'M': options->mergeable = false; break;
	case 'E': options->event_index = false; break;
	case 'I': options->indirect = false; break;
	default: fail("see netgen --help");
	}
}

static void parse(struct options *options, int argc, char **argv)
{
	static const struct option names[] = {
		{"socket", 1, NULL, 's'}, {"pid", 1, NULL, 'p'}, {"floor", 1, NULL, 'f'},
		{"interface", 1, NULL, 'i'}, {"receive", 0, NULL, 'r'}, {"length", 1, NULL, 'l'},
		{"gso", 0, NULL, 'g'}, {"queue-size", 1, NULL, 'q'}, {"window", 1, NULL, 'w'},
		{"burst", 0, NULL, 'u'}, {"buffer", 1, NULL, 'b'}, {"seconds", 1, NULL, 't'}, {"pin", 1, NULL, 'c'},
		{"floor-pin", 1, NULL, 'C'}, {"no-mergeable", 0, NULL, 'M'},
		{"no-event-index", 0, NULL, 'E'}, {"no-indirect", 0, NULL, 'I'}, {0},
	};
	int option, index = 0;

	while ((option = getopt_long(argc, argv, "", names, &index)) != -1)
		set_option(options, option, option == '?' ? "" : names[index].name, optarg);
	if (!options->interface || !options->socket == (options->tap < 0) || optind < argc)
		fail("see netgen --help");
	if (!options->window)
		options->window = options->queue_size;
	if (options->length < 64 || options->length > 65535 || options->buffer < 128 ||
	    options->buffer > 65536 || options->window > 1024)
		fail("--length, --buffer or --window is out of range");
	if (options->queue_size < 4 || options->queue_size > 1024 ||
	    options->queue_size & (options->queue_size - 1))
		fail("--queue-size %u: a power of two, 4 to 1024", options->queue_size);
}

static void print_result(const struct options *options, const struct result *result)
{
	double cpu = (double)result->cpu_ns / 1e9, frames = (double)result->frames;

	if (!result->frames)
		fail("no frame was carried");
	printf("{\"frames\": %lu, \"seconds\": %.6f, \"cpu_seconds\": %.6f, \"per_million\": %.4f, "
	       "\"per_gb\": %.4f, \"per_second\": %.1f, \"verified\": %lu, \"lost\": %lu, "
	       "\"kicks\": %lu, \"calls\": %lu}\n",
	       result->frames, (double)result->elapsed_ns / 1e9, cpu, cpu / frames * 1e6,
	       cpu / frames / options->length * 1e9, frames / (double)result->elapsed_ns * 1e9,
	       result->verified, result->lost, result->kicks, result->calls);
}

int main(int argc, char **argv)
{
	struct options options = {
		.tap = -1, .length = 64, .queue_size = 256, .buffer = 1536, .seconds = 1.0,
		.event_index = true, .indirect = true, .mergeable = true, .pin = -1, .floor_pin = -1,
	};
	struct result result = {0};

	if (argc == 2 && !strcmp(argv[1], "--help")) {
		fputs(usage, stdout);
		return 0;
	}
	parse(&options, argc, argv);
	pin_to(options.pin);
	if (options.socket)
		(options.direction == TRANSMIT ? transmit_run : receive_run)(&options, &result);
	else
		(options.direction == TRANSMIT ? floor_transmit : floor_receive)(&options, &result);
	print_result(&options, &result);
	return 0;
}

// A guest's end of bench/guestnet.py: TCP by large reads and writes, as a busybox knows none.
//
//   stream send ADDRESS PORT BYTES   connect and send so many zeroes
//   stream take PORT                 answer one connection's bytes with their number, in decimal
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[1 << 18];

static int fail(const char *what)
{
	perror(what);
	return 1;
}

static int send_zeroes(const char *address, int port, unsigned long long size)
{
	struct sockaddr_in peer = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (fd < 0 || inet_pton(AF_INET, address, &peer.sin_addr) != 1 ||
	    connect(fd, (struct sockaddr *)&peer, sizeof(peer)) < 0)
		return fail("stream send");
	while (size) {
		ssize_t done = write(fd, buffer, size < sizeof(buffer) ? size : sizeof(buffer));

		if (done <= 0)
			return fail("stream send: write");
		size -= (unsigned long long)done;
	}
	return close(fd);
}

static int take(int port)
{
	struct sockaddr_in own = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	int server = socket(AF_INET, SOCK_STREAM, 0), fd;
	unsigned long long total = 0;
	ssize_t got;

	if (server < 0 || bind(server, (struct sockaddr *)&own, sizeof(own)) < 0 ||
	    listen(server, 1) < 0 || (fd = accept(server, NULL, NULL)) < 0)
		return fail("stream take");
	while ((got = read(fd, buffer, sizeof(buffer))) > 0)
		total += (unsigned long long)got;
	if (got < 0 || dprintf(fd, "%llu\n", total) < 0)
		return fail("stream take: read");
	return close(fd);
}

int main(int count, char **words)
{
	if (count == 5 && !strcmp(words[1], "send"))
		return send_zeroes(words[2], atoi(words[3]), strtoull(words[4], NULL, 10));
	if (count == 3 && !strcmp(words[1], "take"))
		return take(atoi(words[2]));
	fprintf(stderr, "stream: bad command\n");
	return 1;
}

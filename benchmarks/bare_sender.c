/* Sends RoCE frames from many hosts at once, with nothing around it: what the kernel path costs without our engine.
 *
 *   bare_sender SECONDS PACKETS_PER_S FRAME_BYTES PSN_OFFSET FD...  < one frame per FD
 *
 * Each FD is an AF_PACKET socket bound to a host's NIC. Every frame gets the next PSN, so that the receiving NIC takes it as one of a
 * stream; nobody checks the ICRC. With a rate, a millisecond's worth is sent every millisecond, as the engine does; with rate 0 as much
 * as the send buffers take, and frames count against those until they leave the fabric. Prints the frames sent and the seconds.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, HEAD = 64, TICK_NS = 1000000, SEND_BUFFER_FRAMES = 32, FRAME_TRUESIZE = 9216 };

struct host {
	int fd;
	uint32_t psn;
	uint64_t sent;
	uint8_t *frame;
	uint8_t heads[BATCH][HEAD];
	struct iovec parts[BATCH][2];
	struct mmsghdr messages[BATCH];
};

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static int send_some(struct host *host, int count, size_t psn_offset)
{
	int i, done;

	if (count > BATCH)
		count = BATCH;
	for (i = 0; i < count; i++) {
		uint32_t psn = host->psn + i;

		host->heads[i][psn_offset] = psn >> 16;
		host->heads[i][psn_offset + 1] = psn >> 8;
		host->heads[i][psn_offset + 2] = psn;
	}
	done = sendmmsg(host->fd, host->messages, count, MSG_DONTWAIT);
	if (done < 0) {
		if (errno != EAGAIN && errno != ENOBUFS)
			fail("sendmmsg");
		return 0;
	}
	host->psn += done;
	host->sent += done;
	return done;
}

int main(int argc, char **argv)
{
	double seconds, rate;
	size_t frame_bytes, psn_offset, got;
	int hosts = argc - 5, h, i;
	struct host *all;
	struct pollfd *waits;
	uint64_t begin, end, now, total = 0;

	if (hosts < 1)
		return 2;
	seconds = atof(argv[1]);
	rate = atof(argv[2]);
	frame_bytes = atoi(argv[3]);
	psn_offset = atoi(argv[4]);
	all = calloc(hosts, sizeof(*all));
	waits = calloc(hosts, sizeof(*waits));
	for (h = 0; h < hosts; h++) {
		struct host *host = &all[h];

		host->fd = atoi(argv[5 + h]);
		host->frame = malloc(frame_bytes);
		for (got = 0; got < frame_bytes;) {
			ssize_t n = read(0, host->frame + got, frame_bytes - got);

			if (n <= 0)
				fail("read");
			got += n;
		}
		host->psn = host->frame[psn_offset] << 16 | host->frame[psn_offset + 1] << 8 | host->frame[psn_offset + 2];
		for (i = 0; i < BATCH; i++) {
			memcpy(host->heads[i], host->frame, HEAD);
			host->parts[i][0] = (struct iovec){host->heads[i], HEAD};
			host->parts[i][1] = (struct iovec){host->frame + HEAD, frame_bytes - HEAD};
			host->messages[i].msg_hdr.msg_iov = host->parts[i];
			host->messages[i].msg_hdr.msg_iovlen = 2;
		}
		if (rate == 0) {
			int buffer = SEND_BUFFER_FRAMES * FRAME_TRUESIZE / 2; /* the kernel doubles it */

			if (setsockopt(host->fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer)))
				fail("SO_SNDBUF");
		}
		waits[h] = (struct pollfd){host->fd, POLLOUT, 0};
	}
	begin = now_ns();
	end = begin + (uint64_t)(seconds * 1e9);
	if (rate == 0) {
		while (now_ns() < end) {
			int any = 0;

			for (h = 0; h < hosts; h++)
				any += send_some(&all[h], BATCH, psn_offset);
			if (!any)
				poll(waits, hosts, 1000);
		}
	} else {
		struct timespec next;
		uint64_t due_ns = begin;

		while ((now = now_ns()) < end) {
			uint64_t due = (uint64_t)(rate / hosts * (now - begin + TICK_NS) / 1e9);

			for (h = 0; h < hosts; h++)
				while (all[h].sent < due && send_some(&all[h], due - all[h].sent, psn_offset))
					;
			due_ns = due_ns + TICK_NS > now ? due_ns + TICK_NS : now;
			next = (struct timespec){due_ns / 1000000000u, due_ns % 1000000000u};
			clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
		}
	}
	end = now_ns();
	for (h = 0; h < hosts; h++)
		total += all[h].sent;
	printf("%llu %.9f\n", (unsigned long long)total, (end - begin) / 1e9);
	return 0;
}

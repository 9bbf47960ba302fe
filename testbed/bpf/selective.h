/* SPDX-License-Identifier: GPL-2.0-only */
/* Selective retransmission: a responder that takes packets out of order, and a requester that is told which.
 *
 * Packet n of a QP has bit n % TB_WINDOW. The requester keeps at most TB_WINDOW packets beyond the acknowledged ones under
 * way, so a bit never means two of them; bits below the acknowledged ones are clear.
 */
#ifndef TESTBED_SELECTIVE_H
#define TESTBED_SELECTIVE_H

static __always_inline struct tb_window *window_of(__u32 key)
{
	return bpf_map_lookup_elem(&tb_windows, &key);
}

static __always_inline __u64 count_ones(__u64 word)
{
	word -= (word >> 1) & 0x5555555555555555ULL;
	word = (word & 0x3333333333333333ULL) + ((word >> 2) & 0x3333333333333333ULL);
	word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
	return (word * 0x0101010101010101ULL) >> 56;
}

static __always_inline __u64 *word_of(__u64 *words, __u64 packet)
{
	return &words[(packet >> 6) & (TB_WINDOW_WORDS - 1)];
}

/* The first packet not in order is here: take all that follow without a gap. Not static, so that the verifier checks it once and
 * on its own, whatever the caller may know: inlined, its loop would be followed from every state there.
 */
__attribute__((noinline)) int tb_advance_window(__u32 key)
{
	struct tb_qp *qp = bpf_map_lookup_elem(&tb_qps, &key);
	struct tb_window *window = window_of(key);
	__u64 next, messages = 0;
	int i;

	if (!qp || !window)
		return 0;
	next = qp->rx_packets;
	for (i = 0; i <= TB_WINDOW_WORDS; i++) {
		__u64 *received = word_of(window->received, next), *ends = word_of(window->ends, next);
		__u32 bit = next & 63;
		__u64 missing = ~*received >> bit;
		__u64 run = ((missing & -missing) - 1) << bit; /* the ones from this bit to the first zero; to the end without one */

		messages += count_ones(*ends & run);
		*received &= ~run;
		*ends &= ~run;
		next += count_ones(run);
		if (!(run >> 63))
			break;
	}
	qp->rx_packets = next;
	if (messages) {
		qp->rx_messages += messages;
		qp->last_message_ns = bpf_ktime_get_ns();
	}
	return 0;
}

/* Clear what lies below `from` in a block that begins at block->first. */
static __always_inline void clear_below(struct sack_block *block, __u64 from)
{
	__s64 below = (__s64)(from - block->first);

	if (below <= 0)
		return;
	if (below >= TB_SACK_PACKETS) {
		block->low = block->high = 0;
	} else if (below >= 64) {
		block->low = 0;
		block->high &= ~0ULL << ((below - 64) & 63);
	} else {
		block->low &= ~0ULL << (below & 63);
	}
}

/* Which of the 128 packets up to and including `last` came out of order. */
static __always_inline void read_block(const struct tb_qp *qp, struct tb_window *window, __u64 last,
				       struct sack_block *block)
{
	__u64 first = last - (TB_SACK_PACKETS - 1);
	__u64 one = *word_of(window->received, first), two = *word_of(window->received, first + 64);
	__u64 three = *word_of(window->received, first + 128);
	__u32 shift = first & 63;

	block->first = first;
	block->low = one >> shift;
	block->high = two >> shift;
	if (shift) {
		block->low |= two << (64 - shift);
		block->high |= three << (64 - shift);
	}
	clear_below(block, qp->rx_packets);
}

static __always_inline int respond_selective(struct __sk_buff *skb, struct tb_qp *qp, __u32 key,
					     const struct answered *to, __u8 opcode, __u32 psn_word, __u32 payload_bytes)
{
	__u32 psn = psn_word & 0xffffff, last = opcode == 0x08 || opcode == 0x0a;
	__u32 ahead = (psn - (qp->initial_rx_psn + (__u32)qp->rx_packets)) & 0xffffff;
	__u64 number = qp->rx_packets + ahead, bit = 1ULL << (number & 63), *received, *ends;
	struct tb_window *window = window_of(key);
	struct sack_block block;
	int answers = psn_word >> 31;
	__u32 aeth;

	if (!window)
		return TC_ACT_SHOT;
	received = word_of(window->received, number);
	ends = word_of(window->ends, number);
	if (ahead >= 0x800000) {
		qp->duplicate_packets++;
	} else if (ahead >= TB_WINDOW) {
		return TC_ACT_SHOT; /* no requester sends that far */
	} else if (!ahead && qp->rx_highest <= number) { /* in order, and nothing waits behind it */
		qp->rx_packets++;
		qp->rx_payload_bytes += payload_bytes;
		if (last) {
			qp->rx_messages++;
			qp->last_message_ns = bpf_ktime_get_ns();
		}
	} else if (*received & bit) {
		qp->duplicate_packets++;
	} else {
		*received |= bit;
		if (last)
			*ends |= bit;
		qp->rx_payload_bytes += payload_bytes;
		if (number + 1 > qp->rx_highest)
			qp->rx_highest = number + 1;
		if (ahead)
			qp->out_of_order_packets++;
		else
			tb_advance_window(key);
		if (number + TB_SACK_LATE_PACKETS < qp->rx_highest)
			answers = 1;
	}
	if (!answers)
		return TC_ACT_SHOT;
	qp->sent_acks_packets++;
	psn = qp->initial_rx_psn + (__u32)qp->rx_packets - 1;
	if (qp->rx_highest <= qp->rx_packets)
		return answer(skb, to, qp, psn, 0x1f);
	/* The block ends with this packet, unless that is acknowledged anyway. */
	if (ahead >= 0x800000 || number < qp->rx_packets)
		number = qp->rx_highest - 1;
	read_block(qp, window, number, &block);
	aeth = 0x1fU << 24 | (__u32)(qp->rx_messages & 0xffffff);
	if (!write_answer(skb, to, qp, 0x11, 0, psn, aeth, &block, TB_SACK_LEN))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0);
}

/* Take it that the next `count` packets are acknowledged, at most TB_WINDOW. Not static: as tb_advance_window(). */
__attribute__((noinline)) int tb_forget_acked(__u32 key, __u32 count)
{
	struct tb_qp *qp = bpf_map_lookup_elem(&tb_qps, &key);
	struct tb_window *window = window_of(key);
	__u64 next, end;
	int i;

	if (!qp || !window)
		return 0;
	next = qp->acked_packets;
	end = next + count;
	qp->acked_packets = end;
	if (qp->sacked_until <= next)
		return 0; /* no bit is set */
	for (i = 0; i <= TB_WINDOW_WORDS && next < end; i++) {
		__u64 ones = ~0ULL << (next & 63), behind = (next | 63) + 1;

		if (behind > end)
			ones &= ~0ULL >> ((behind - end) & 63);
		*word_of(window->received, next) &= ~ones;
		next = behind;
	}
	return 0;
}

static __always_inline int acknowledge_selective(struct __sk_buff *skb, struct tb_qp *qp, __u32 key)
{
	struct tb_window *window = window_of(key);
	struct answer_frame *frame;
	struct sack_block block;
	__u32 ahead, shift, word;

	if (!window || pull(skb, TB_SACK_LEN) < 0)
		return TC_ACT_SHOT;
	frame = packet_data(skb);
	if ((void *)frame + TB_ACK_LEN > packet_data_end(skb) || bpf_ntohl(frame->words[0]) >> 24 == 0x60)
		return TC_ACT_SHOT; /* a selective responder sends no NAK */
	ahead = (bpf_ntohl(frame->bth.psn) + 1 - (qp->initial_tx_psn + (__u32)qp->acked_packets)) & 0xffffff;
	if (ahead && ahead <= TB_WINDOW)
		tb_forget_acked(key, ahead);
	if ((void *)frame + TB_SACK_LEN > packet_data_end(skb) ||
	    bpf_ntohs(frame->ip.tot_len) != TB_SACK_LEN - TB_ETH_HLEN)
		return TC_ACT_SHOT;
	word = bpf_ntohl(frame->words[1]);
	if (word >> 24 != TB_SACK_TYPE)
		return TC_ACT_SHOT;
	/* 24 bits of the first packet's number are told: it is near the acknowledged ones. */
	ahead = (word - (qp->initial_tx_psn + (__u32)qp->acked_packets)) & 0xffffff;
	block.first = qp->acked_packets + ahead - (ahead < 0x800000 ? 0 : 0x1000000);
	block.low = (__u64)bpf_ntohl(frame->words[2]) << 32 | bpf_ntohl(frame->words[3]);
	block.high = (__u64)bpf_ntohl(frame->words[4]) << 32 | bpf_ntohl(frame->words[5]);
	clear_below(&block, qp->acked_packets);
	if (!(block.high >> 63) || ahead - (ahead < 0x800000 ? 0 : 0x1000000) + TB_SACK_PACKETS > TB_WINDOW)
		return TC_ACT_SHOT; /* all of it is acknowledged, or it cannot be */
	shift = block.first & 63;
	*word_of(window->received, block.first) |= block.low << shift;
	if (shift) {
		*word_of(window->received, block.first + 64) |= block.high << shift | block.low >> (64 - shift);
		*word_of(window->received, block.first + 128) |= block.high >> (64 - shift);
	} else {
		*word_of(window->received, block.first + 64) |= block.high;
	}
	if (block.first + TB_SACK_PACKETS > qp->sacked_until)
		qp->sacked_until = block.first + TB_SACK_PACKETS;
	return TC_ACT_SHOT;
}

#endif
